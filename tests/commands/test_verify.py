"""`python -m msn verify` on good and on wrong figures."""

import json

from safetensors.torch import load_file, save_file

from tests.conftest import GOLDEN


def test_shipped_figures_verify(command):
    code, out, _ = command("verify")
    assert code == 0
    assert "219 figures" in out
    assert "0 out of tolerance" in " ".join(out.split())


def test_shipped_figures_of_masked_autoencoders_verify(command):
    code, out, _ = command("verify", "golden=mae")
    assert code == 0
    assert "figures of golden_mae.safetensors" in " ".join(out.split())
    assert "0 out of tolerance" in " ".join(out.split())


def test_a_wrong_figure_is_named_and_ends_in_exit_code_1(command, tmp_path):
    tensors = load_file(GOLDEN["default"])
    tensors["target.final.pos_embed"] = tensors["target.final.pos_embed"] + 1e-7
    save_file(tensors, tmp_path / "wrong.safetensors")
    (tmp_path / "wrong.json").write_text(GOLDEN["default"].with_suffix(".json").read_text())
    code, out, _ = command("verify", f"golden={tmp_path / 'wrong.safetensors'}")
    assert code == 1
    assert "1 out of tolerance" in " ".join(out.split())
    assert "OUT" in out


def test_a_figure_that_is_not_a_number_fails(command, tmp_path):
    figures = json.loads(GOLDEN["default"].with_suffix(".json").read_text())
    figures["steps"][2]["ce"] = float("nan")
    save_file(load_file(GOLDEN["default"]), tmp_path / "nan.safetensors")
    (tmp_path / "nan.json").write_text(json.dumps(figures))
    code, out, _ = command("verify", f"golden={tmp_path / 'nan.safetensors'}", "all=true")
    assert code == 1
    assert "step2.ce" in out
