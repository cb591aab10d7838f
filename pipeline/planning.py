"""Planning: what a command has to run, on which inputs, and which artifacts it takes as they are.

    config --dag.select--> what comes from outside, identified --fit--> settings --identity.plan--> nodes
       --Store.find--> PlannedRun --validate_data--> executor

Owns: what is made again, what is missing, and judging all data and given files before anything starts.
Does not own: edges and fingerprints (dag), settings that follow from a given model (fitted_defaults), what is
found under `outputs/` (artifacts), running it (executor).
"""

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import dag, identity, placement
from pipeline.architecture import NAMES_OF_EXPERTS
from pipeline.artifacts import Given, Store
from pipeline.errors import ConfigError, MissingStage
from pipeline.experiment import EXPERTS_WIDTH, STAGE_FIELDS, ExperimentConfig, too_narrow
from pipeline.fitted_defaults import Fit, fit
from pipeline.given_model import GivenModel
from pipeline.manifest import MANIFEST, Manifest
from pipeline.model_path import model_at_hand, model_directory
from pipeline.stage_table import MODEL, STAGES, data_of
from rollout.ground.errors import ExpectedError
from rollout.ground.section import Section
from rollout.safetensors_header import read_header
from stages.config.evaluate import EvaluateConfig
from stages.config.score import ScoreFunction
from stages.data.scoring import load_judge
from stages.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """What one command is going to do."""

    config: ExperimentConfig  # fitted to the given model: nothing is left open
    store: Store
    nodes: Mapping[str, identity.Node]  # in the order of the stage table
    outside: Mapping[str, Given]  # input keys that no stage of this run makes
    present: Mapping[str, Manifest]  # verified artifacts that are taken as they are
    to_run: tuple[str, ...]
    replaced: frozenset[str]  # stages of to_run whose artifact is made again
    fit: Fit  # what was fitted, and to which model


def plan_run(config: ExperimentConfig, *, last: str | None = None, force: str | None = None) -> PlannedRun:
    """All configured stages up to `last`; `force` and what needs it are made again.

    Raises ConfigError, DataError (a missing dataset), CorruptArtifact.
    """
    stages = dag.until(config, last)
    if not stages:
        raise ConfigError("no stage has a section, so there is nothing to run; add `sft:` or another")
    if force is not None and force not in stages:
        raise ConfigError(f"--force {force}: not a stage of this run, which has {', '.join(stages)}")
    forced = frozenset() if force is None else dag.downstream(config, force)
    store = Store(config.outputs)
    selection = dag.select(config, stages)
    dag.check_can_run(config, stages)
    outside = _identified(config, store, selection, {})
    fitted = fit(config, _model_of(config, outside, dag.trained_from(config, selection)))
    config = fitted.config
    nodes = identity.plan(config, selection, _fingerprints(outside))
    present = _present(store, [node for stage, node in nodes.items() if stage not in forced])
    return PlannedRun(
        config=config,
        store=store,
        nodes=nodes,
        outside=outside,
        present=present,
        to_run=tuple(stage for stage in nodes if stage not in present),
        replaced=forced,
        fit=fitted,
    )


def plan_stage(
    config: ExperimentConfig,
    stage: str,
    *,
    inputs: Mapping[str, Path],
    force: bool,
    command: Callable[[str], str],
) -> PlannedRun:
    """One stage, on what the stages before it left or on `inputs`.

    `command(stage)` is how a user makes a missing stage. Raises MissingStage besides what `plan_run` raises.
    """
    takes = dag.needs(config, stage, inputs.keys())
    if unused := inputs.keys() - set(takes):
        could_take = ", ".join(dag.needs(config, stage, STAGES)) or "nothing"
        raise ConfigError(f"--input {min(unused)}: {stage} takes {could_take}")
    store = Store(config.outputs)
    selection = dag.select(config, [stage], inputs.keys())
    dag.check_can_run(config, [stage], inputs.keys())
    outside = _identified(config, store, selection, inputs)
    fitted = fit(config, _model_of(config, outside, dag.trained_from(config, selection)))
    config = fitted.config
    nodes = identity.plan(config, selection, _fingerprints(outside))
    needed = [nodes[key] for key in takes if key in nodes]
    present = _present(store, needed)
    for node in needed:
        if node.stage not in present:
            raise MissingStage(
                f"{stage}: needs {node.stage}, which has not finished with this config; run "
                f"`{command(node.stage)}`, or give --input {node.stage}=DIR"
            )
    if not force:
        present |= _present(store, [nodes[stage]])
    return PlannedRun(
        config=config,
        store=store,
        nodes={key: node for key, node in nodes.items() if key in present or key == stage},
        outside=outside,
        present=present,
        to_run=() if stage in present else (stage,),
        replaced=frozenset({stage} if force else ()),
        fit=fitted,
    )


def fitted_to_what_is_here(config: ExperimentConfig) -> Fit:
    """`config` as a run would fit it, as far as this machine tells the size of its model: fetches nothing.

    Raises what `model_directory` raises for a model that is here.
    """
    model = config.model
    if model.path is not None and model_at_hand(model.path, model.revision):
        directory = model_directory(model.path, model.revision)  # judged before anything of it is read
        return fit(config, GivenModel.in_directory(directory, named=f"model.path {model.path}"))
    return fit(config, _model_described(config))


def validate_data(planned: PlannedRun) -> None:
    """Before anything starts: judge the model directories that stages start from, read their datasets, load
    the scoring function and the tokenizer that prepare is given.

    Raises DataError, ModelError.
    """
    from stages.data.validation import validate

    check_given_models(
        planned.config, planned.to_run, {key: given.path for key, given in planned.outside.items()}
    )
    for stage in planned.to_run:
        if STAGES[stage].makes == "corpus":
            _check_given_to_prepare(planned)
    for stage, sources in identity.datasets(planned.config, planned.to_run).items():
        validate(list(sources.values()), data_of(stage).reads, getattr(planned.config, stage))
    for stage in planned.to_run:
        match getattr(planned.config, stage):
            case EvaluateConfig(score=ScoreFunction() as score):
                load_judge(score, key=f"{stage}.score")


def check_given_models(config: ExperimentConfig, stages: Sequence[str], given: Mapping[str, Path]) -> None:
    """Judge the directories that `stages` are given (input key -> directory). Can each be trained, or scored
    with, as these stages will do it, and does its tokenizer fit it? Raises ModelError.
    """
    corpora = {key: path for key, path in given.items() if _is_corpus(key)}
    models = {key: path for key, path in given.items() if key not in corpora}
    if not models or all(STAGES[stage].makes == "corpus" for stage in stages):
        return
    makes_scorer = any(STAGES[stage].makes == "reward model" for stage in stages)
    from stages.training.model_rules import check_model, check_rows

    for key, path in models.items():
        named = _as_given(config, key, path)
        is_scorer = key in STAGES and STAGES[key].makes == "reward model"
        rows = check_model(
            path,
            named=named,
            context_length=config.model.context_length,
            scores=is_scorer or makes_scorer,
            recomputing=_asking(config, stages, "gradient_checkpointing"),
            balancing=_asking(config, stages, "router_aux_loss_coef"),
        )
        check_rows(rows, _highest_id(config, stages, path), named=named, tokenizer=named)
        if is_scorer:
            _check_scores(path, named)
        else:
            _check_width_of_experts(config, stages, path, named)
        for maker, corpus in corpora.items():
            if any(STAGES[stage].makes == "policy" and maker in dag.needs(config, stage) for stage in stages):
                highest = _highest_id(config, stages, corpus)
                check_rows(rows, highest, named=named, tokenizer=_as_given(config, maker, corpus))


def check_described_model(config: ExperimentConfig, described: Path) -> None:
    """Judge a model by its config.json alone (`placement.described_by`): its weights and tokenizer are not on
    this machine yet. Raises ModelError.
    """
    from stages.training.model_rules import check_model_config, read_config

    named = f"model.path {config.model.path}"
    if described == config.model.architecture:
        named += " (as model.architecture describes it)"
    check_model_config(
        read_config(described, named=named),
        named=named,
        context_length=config.model.context_length,
        scores=config.reward is not None,
    )
    _check_width_of_experts(config, STAGE_FIELDS, described, named)


def _check_width_of_experts(
    config: ExperimentConfig, stages: Sequence[str], described: Path, named: str
) -> None:
    """Raises ModelError for a mixture that the engines of `stages` have no kernel for. `described`: the model
    or its config.json.
    """
    from stages.training.model_rules import read_config

    asking = [stage for stage in config.stages_with_cpu_vllm() if stage in stages]
    if not asking:
        return
    model = read_config(described, named=named)
    stated = model.to_dict()
    has_experts = any(name in stated and stated[name] for name in NAMES_OF_EXPERTS["num_experts"])
    if has_experts and model.hidden_size % EXPERTS_WIDTH:
        raise ModelError(f"{named}: hidden_size {model.hidden_size} {too_narrow(asking[0])}")


def _check_scores(directory: Path, named: str) -> None:
    """Raises ModelError for a reward model without a head, or without what its scores are normalised by."""
    from stages.training.models import ScoreNormaliser

    weights = {name for file in directory.glob("*.safetensors") for name in read_header(file)}
    if not any(name.startswith("score.") for name in weights):
        raise ModelError(f"{named}: no score head in it; give a reward model (rlhf reward makes one)")
    ScoreNormaliser.load(directory)


def _asking(config: ExperimentConfig, stages: Sequence[str], setting: str) -> list[str]:
    """The keys of `stages` under which `setting` is on."""
    sections: dict[str, Section] = {stage: getattr(config, stage) for stage in stages}
    return [
        f"{stage}.{setting}"
        for stage, section in sections.items()
        if setting in type(section).model_fields and getattr(section, setting)
    ]


def _highest_id(config: ExperimentConfig, stages: Sequence[str], directory: Path) -> int:
    """Of the ids that its tokenizer and the template write in these stages. Raises ModelError."""
    from stages.data.chat.tokenizer import ChatTokenizer

    reads_documents = any(_reads_documents(config, stage) for stage in stages)
    return ChatTokenizer.load(directory, config.model.chat_template).highest_id(documents=reads_documents)


def _reads_documents(config: ExperimentConfig, stage: str) -> bool:
    """Whether a stage makes a corpus, or takes one where there is one."""
    return STAGES[stage].makes == "corpus" or any(map(_is_corpus, dag.needs(config, stage, STAGES)))


def _is_corpus(key: str) -> bool:
    return key in STAGES and STAGES[key].makes == "corpus"


def current_fingerprints(planned: PlannedRun) -> dict[str, str]:
    """Of every configured stage, as far as what this run does not need (later datasets) lets us tell."""
    known = {stage: node.fingerprint for stage, node in planned.nodes.items()}
    config, outside = planned.config, _fingerprints(planned.outside)
    for stage in dag.configured(config):
        with contextlib.suppress(ExpectedError):
            needs = dag.needs(config, stage, outside.keys())
            if stage not in known and outside.keys() | known.keys() >= set(needs):
                selection = dag.Selection(stages=(stage,), outside=needs)
                known[stage] = identity.plan(config, selection, outside | known)[stage].fingerprint
    return known


def given_input(store: Store, key: str, path: Path) -> Given:
    """The directory at `path`, given as the input `key`, with the fingerprint of what it now holds."""
    if key == MODEL:
        return Given(path=path, fingerprint=store.content_of(path))
    return store.identify(key, path)


def _as_given(config: ExperimentConfig, key: str, path: Path) -> str:
    """What the user wrote for an input key."""
    return f"model.path {config.model.path}" if key == MODEL else f"--input {key}={path}"


def _check_given_to_prepare(planned: PlannedRun) -> None:
    """Raises DataError for unknown languages, ModelError for a tokenizer or template that cannot be used."""
    prepare, template = planned.config.prepare, planned.config.model.chat_template
    assert prepare is not None
    if prepare.languages:
        from stages.data.corpus.languages import check_languages

        check_languages(prepare.languages)
    model = planned.outside.get(MODEL)
    tokenizer = prepare.tokenizer if model is None else model.path
    if tokenizer is not None or template is not None:
        from stages.data.corpus.vocabulary import given_tokenizer

        given_tokenizer(tokenizer, prepare, template)


def _identified(
    config: ExperimentConfig, store: Store, selection: dag.Selection, inputs: Mapping[str, Path]
) -> dict[str, Given]:
    outside = {}
    for key in selection.outside:
        if key == MODEL:
            assert config.model.path is not None
            outside[key] = given_input(store, key, model_directory(config.model.path, config.model.revision))
        else:
            outside[key] = given_input(store, key, inputs[key])
    return outside


def _model_of(
    config: ExperimentConfig, outside: Mapping[str, Given], trained_from: Collection[str]
) -> GivenModel | None:
    """The model that a run starts from, of which sizes are taken; None for a chain from scratch.

    `model.path`, wherever its weights come in: a stage that is run alone is fitted as within the graph.
    Without it, a model of somebody else's among `trained_from`: an artifact of ours came from scratch.
    """
    if MODEL in outside:
        return GivenModel.in_directory(outside[MODEL].path, named=_as_given(config, MODEL, Path()))
    described = _model_described(config)
    if described is not None and described.num_parameters is not None:
        return described
    for key in (key for key in STAGES if key in trained_from and key in outside):
        if described is not None or _is_foreign(outside[key]):
            path = outside[key].path
            return GivenModel.in_directory(path, named=_as_given(config, key, path))
    return described


def _model_described(config: ExperimentConfig) -> GivenModel | None:
    """The model of `model.path` by its files on this machine, else by the config.json that the config gives
    for it. None where none is given.
    """
    model = config.model
    if model.path is None:
        return None
    named = f"model.path {model.path}"
    own = placement.config_json_of(model.path, model.revision)
    if own is not None:
        return GivenModel.in_directory(own.parent, named=named)
    if model.architecture is not None:
        return GivenModel.described_in(model.architecture, named=named)
    return GivenModel.unknown(named)


def _is_foreign(given: Given) -> bool:
    return not (given.path / MANIFEST).is_file()


def _fingerprints(outside: Mapping[str, Given]) -> dict[str, str]:
    return {key: given.fingerprint for key, given in outside.items()}


def _present(store: Store, nodes: Sequence[identity.Node]) -> dict[str, Manifest]:
    found = {node.stage: store.find(node.stage, node.fingerprint) for node in nodes}
    return {stage: manifest for stage, manifest in found.items() if manifest is not None}
