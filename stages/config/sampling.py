"""How the responses are sampled that a reward model scores; reward and ppo share it. Light import."""

from rollout.ground.section import Section


class ResponseSampling(Section):
    """How responses are sampled that a reward model scores: what the distribution of the scores hangs on."""

    max_response_tokens: int
    """Response tokens at most, the end token included."""
    temperature: float
    """Sampling temperature."""
