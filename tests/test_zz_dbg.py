from test_ppo import *
def test_dbg(inputs, prompts, tmp_path, monkeypatch):
    s = settings_for(prompts, precision="bf16")
    m, whole, r = run_in(tmp_path / "whole", s, inputs)
    print(m)
    run_killed_in_step(2, tmp_path / "killed", s, inputs, monkeypatch)
    m, whole2, r2 = run_in(tmp_path / "killed", s, inputs)
    assert (whole, r)==(whole2,r2)
