import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_dsv32.tools import cli


def test_help_imports_nothing_heavy_and_lists_the_commands() -> None:
    code = (
        "import sys\n"
        "from vllm_dsv32.tools.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'vllm', 'transformers'} & set(sys.modules), 'heavy import'\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "doctor" in shown.stdout
    assert "make-checkpoint" in shown.stdout


def test_make_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    flags = ["--layers", "2", "--heads", "2", "--mtp-layers", "0", "--top-k", "32", "--weight-format", "fp8"]
    assert cli.main(["make-checkpoint", str(out), *flags, "--no-yarn", "--set", "rope_theta=20000"]) == 0
    assert f"{out}: random-weight DeepSeek-V3.2 checkpoint" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert config["num_attention_heads"] == config["num_key_value_heads"] == 2
    assert config["num_nextn_predict_layers"] == 0
    assert config["index_topk"] == 32
    assert config["quantization_config"]["quant_method"] == "fp8"
    assert config["rope_theta"] == 20000
    assert "rope_scaling" not in config

    assert cli.main(["make-checkpoint", str(out)]) == 2
    assert "already holds a checkpoint" in capsys.readouterr().err
    assert cli.main(["make-checkpoint", str(out), "--overwrite", "--experts", "7"]) == 2
    assert "got 7 experts in 4 groups" in capsys.readouterr().err


@pytest.mark.parametrize("item", ["index_topk", "=3", "index_topk=three"])
def test_set_wants_json(item: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["make-checkpoint", str(tmp_path / "model"), "--set", item])
    assert caught.value.code == 2
    assert "expected KEY=JSON such as index_topk=32" in capsys.readouterr().err


def test_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["make-checkpoint", str(tmp_path / "file" / "model")]) == 2
    assert "file" in capsys.readouterr().err
