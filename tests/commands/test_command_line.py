"""Paths and names stay what a person typed; Hydra's own words keep their meaning."""

import os
import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import msn
from msn.__main__ import main
from msn.commands.command_line import parse_flags, quote_paths
from msn.commands.entry import compose
from msn.errors import UserError
from msn.schema import as_argument

# After the equals sign, and what is composed of it.
AS_THEY_ARE = [
    *("1_1_1", "1.10", "2024_05", "007", "true", "1e5", "nan", "/x/müller", "/x/photos (1)"),
    *("/x/a=b", "/x/a,b", "epoch=3-step=9.ckpt", "Bücher.safetensors", "[a]", "[a].jpg", "{a:b}"),
    *("it's", 'a "b"', "a\\", "a\\'b", "100 %", "# x", "$RECYCLE.BIN", "a:b", "x\ty", "\udce9"),
]
PATHS = (
    *("data.root", "data.val_root", "init", "run.name", "run.dir", "run.root", "checkpoint"),
    *("cache_dir", "protocol.write_lists", "protocol.lists_dir", "out", "runs", "root", "dump"),
    *("golden", "head", "json", "images", "data.labels"),
    *("logger.wandb.project", "logger.wandb.name"),
)


def read(override):
    """What Hydra makes of an override."""
    return OverridesParser.create().parse_override(quote_paths([override])[0]).value()


def composed(command, override):
    return OmegaConf.select(compose(command, [override]), override.partition("=")[0].lstrip("+"))


@pytest.mark.parametrize("value", AS_THEY_ARE)
def test_names_and_paths_stay_text(value):
    is_list = value.startswith("[") and value.endswith("]")
    for key in ("run.name", "data.root", "+run.name", "++init"):
        assert read(f"{key}={value}") == value
    assert read(f"checkpoint={value}") == (["a"] if is_list else value)


@pytest.mark.parametrize("key", ["runs", "data.root"])
def test_what_a_message_says_to_paste_is_read_as_that_path(key, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = [
        *AS_THEY_ARE,
        "null",
        "'x'",
        '"x',
        "~x",
        "a:~/x",
        "[a,b]",
        "['a']",
        "${seed}",
        "~\\'\\",
    ]
    paths += ['it\'s, (a) [b] "c" \\d', "a\nb", "*", "--help", "!x", "`ls`", "a;b&c|d>e"]
    line = " ".join(as_argument(key, path) for path in paths)
    told = subprocess.run(["sh", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    words = os.fsdecode(told.stdout).split("\0")[:-1]
    command = "report" if key == "runs" else "embed"
    for path, word in zip(paths, words, strict=True):
        node = OmegaConf.select(compose(command, [word]), key)
        assert node == path


def test_every_key_that_is_a_path_is_one():
    for key in PATHS:
        assert read(f"{key}=/x/mü (1),=~") == "/x/mü (1),=~", key
    assert composed("train", "data.root=/x/mü (1),=~") == "/x/mü (1),=~"
    assert compose(
        "train", ["logger=wandb", "logger.wandb.project=2024_05"]
    ).logger.wandb.project == ("2024_05")


def test_the_home_directory_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert read("data.root=~/x") == "/home/me/x"
    found = read("checkpoint=[a:~/x,timm/vit@~/y,~/z,b~]")
    assert found == ["a:/home/me/x", "timm/vit@/home/me/y", "/home/me/z", "b~"]


def test_what_hydra_reads_keeps_its_meaning(tmp_path, monkeypatch):
    assert read("init=null") is None
    assert read("run.name=") == ""
    assert read("run.name='x y'") == "x y"
    assert read('run.name="7"') == "7"
    assert read("run.name=run-${seed}") == "run-${seed}"
    assert read("checkpoint=[a:x, b:1_1]") == ["a:x", "b:1_1"]
    assert read("checkpoint=['a:x,y',b:ü]") == ["a:x,y", "b:ü"]
    assert read("protocol.lists=[007,a b]") == ["007", "a b"]
    assert read("runs=[]") == []
    assert read("images=20") == 20
    assert read("planning.images=20") == 20
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[a,b]").mkdir()
    assert read("checkpoint=[a,b]") == "[a,b]"


def test_init_key_is_a_text_or_a_mapping_of_texts():
    assert composed("eval_lowshot", "init_key=1_1") == "1_1"
    assert composed("eval_lowshot", "init_key={a:model,1_1: 007}") == {"a": "model", "1_1": "007"}
    for wrong in ("{a}", "{a:}", "{:x}", "{}", "{a:x,a:y}"):
        with pytest.raises(UserError, match="init_key=.* write {name:value,name:value}"):
            compose("eval_lowshot", [f"init_key={wrong}"])
    assert quote_paths(["init_key={a:x,b:y},z"], sweep=True) == ["init_key='{a:x,b:y}','z'"]


def test_in_a_sweep_commas_separate_choices():
    given = ["run.name=1_1,b c,'d,e'", "checkpoint=[a:x,b],[c]", "seed=1,2", "run.name=range(1,3)"]
    assert quote_paths(given, sweep=True) == [
        *("run.name='1_1','b c','d,e'", "checkpoint=['a:x','b'],['c']"),
        *("seed=1,2", "run.name=range(1,3)"),
    ]


def test_flags_may_stand_anywhere():
    flags = parse_flags(["a=1", "--multirun", "b=2", "--cfg", "job", "-p", "data"])
    assert flags.overrides == ["a=1", "b=2"]
    assert (flags.multirun, flags.cfg, flags.package) == (True, "job", "data")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resolve"], "--resolve and --package go with --cfg job"),
        (["--package", "data"], "--resolve and --package go with --cfg job"),
        (["--shell-completion", "x"], "unrecognized arguments: --shell-completion"),
        (["--cfg", "all"], "invalid choice: 'all'"),
    ],
)
def test_flags_that_are_none_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        parse_flags(arguments)


def test_a_null_byte_is_refused():
    with pytest.raises(UserError, match="run.name: a value cannot contain a null byte"):
        compose("train", ["run.name=a\0b"])


@pytest.mark.parametrize("arguments", [["--version"], ["train", "--version"]])
def test_the_version_is_that_of_this_package(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["msn", *arguments])
    main()
    assert capsys.readouterr().out == f"msn {msn.__version__}\n"
