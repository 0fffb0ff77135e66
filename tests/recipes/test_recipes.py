"""vLLM's parser and the plugin's checks accept every command of recipes/, and every flag is explained."""

import json
import re
import subprocess
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
from recipes.pages import RECIPES, ROOT, Command, Page, load_script, pages, parse_command, variables_in
from vllm import AsyncEngineArgs
from vllm.config import VllmConfig
from vllm.entrypoints.cli.serve import make_arg_parser, validate_parsed_serve_args
from vllm.envs import environment_variables
from vllm.plugins import load_general_plugins
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_dsv32 import startup
from vllm_dsv32.config import kernel_overrides, plugin_options, shared_selection_from
from vllm_dsv32.kernels.dispatch import KERNELS, OPERATIONS
from vllm_dsv32.tools import cli
from vllm_dsv32.tools.tiny_checkpoint import FP8_QUANTIZATION, ModelSizes, TinyCheckpointOptions, make_config
from vllm_dsv32.tools.tiny_tokenizer import write_tokenizer

memory = load_script("memory")

PAGES = pages()
README = Page(ROOT / "README.md")
SERVE_COMMANDS = [
    (page, command)
    for page in [README, *PAGES]
    for command in page.commands
    if command.starts_with("vllm", "serve")
]

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
# Of other programs than vLLM; what each does is its own documentation's to say.
OTHER_VARIABLES = {
    "DG_JIT_CACHE_DIR",
    "GLOO_SOCKET_IFNAME",
    "HF_HUB_OFFLINE",
    "NCCL_NVLS_ENABLE",
    "NCCL_SOCKET_IFNAME",
    "OPENAI_API_BASE_URL",
    "OPENAI_API_KEY",
    "TRITON_CACHE_DIR",
}


def write_published_config(folder: Path, quantization: dict) -> Path:
    """What vLLM reads of the published checkpoint before weights: its configuration, and a tokenizer."""
    sizes = {size.name: memory.PUBLISHED[size.name] for size in fields(ModelSizes) if size.name in memory.PUBLISHED}
    routing = {"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "index_topk": 2048}
    options = TinyCheckpointOptions(
        **(sizes | routing),
        config_overrides={"vocab_size": memory.PUBLISHED["vocab_size"], "quantization_config": quantization},
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(make_config(options)))
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """What stands for each model that the recipes serve."""
    folder = tmp_path_factory.mktemp("models")
    published = write_published_config(folder / "published", dict(FP8_QUANTIZATION))
    tiny = folder / "tiny"
    assert cli.main(["make-checkpoint", str(tiny), "--layers", "3", "--experts", "8"]) == 0
    return {
        "deepseek-ai/DeepSeek-V3.2": published,
        "/models/DeepSeek-V3.2": published,
        "/models/DeepSeek-V3.2-4bit": write_published_config(folder / "awq", AWQ),
        "eval/small_model/checkpoint": ROOT / "eval/small_model/checkpoint",
        "tiny-v32": tiny,
    }


@pytest.fixture(scope="module")
def serve_parser() -> FlexibleArgumentParser:
    load_general_plugins()
    return make_arg_parser(FlexibleArgumentParser())


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """Whatever a command or the plugin sets is taken back."""
    for name in ("VLLM_DEEP_GEMM_WARMUP", "VLLM_USE_FLASHINFER_SAMPLER"):
        monkeypatch.delenv(name, raising=False)


def engine_config(parser: FlexibleArgumentParser, command: Command, models: dict[str, Path]) -> VllmConfig:
    """As `vllm serve` makes it, the plugin's configuration hook included."""
    arguments = parser.parse_args(command.words[2:])
    validate_parsed_serve_args(arguments)
    arguments.model = str(models[arguments.model_tag])
    return AsyncEngineArgs.from_cli_args(arguments).create_engine_config(
        usage_context=UsageContext.OPENAI_API_SERVER, headless=arguments.headless
    )


def name_of(value: object) -> str | None:
    if isinstance(value, Page):
        return value.path.stem
    if isinstance(value, Command):
        return "-".join(word.removeprefix("--") for word in value.words[3:9:2])
    return None


@pytest.mark.parametrize(("page", "command"), SERVE_COMMANDS, ids=name_of)
def test_serve_command_is_accepted(page, command, serve_parser, models, monkeypatch):
    for name, value in command.variables.items():
        monkeypatch.setenv(name, value)
    # The parser would complete an abbreviation.
    assert set(command.flags) <= set(serve_parser._option_string_actions)
    config = engine_config(serve_parser, command, models)
    assert config.model_config.architecture == "DeepseekV32ForCausalLM"
    assert config.parallel_config.world_size_across_dp == num_gpus(command)
    expected = "fp8_ds_mla" if "fp8" in command.words else "auto"
    assert config.cache_config.cache_dtype == expected


def num_gpus(command: Command) -> int:
    sizes = ("--tensor-parallel-size", "--pipeline-parallel-size", "--data-parallel-size")
    product = 1
    for size in sizes:
        if size in command.words:
            product *= int(command.words[command.words.index(size) + 1])
    return product


@pytest.mark.parametrize(
    "flags",
    [
        "--attention-backend TRITON_MLA",
        "--dtype float16",
        "--decode-context-parallel-size 2",
        "--kv-cache-dtype fp8_e5m2",
    ],
)
def test_a_refused_flag_is_seen(flags, serve_parser, models):
    command = parse_command(f"vllm serve deepseek-ai/DeepSeek-V3.2 --tensor-parallel-size 8 {flags}")
    with pytest.raises(ValueError, match="is not served"):
        engine_config(serve_parser, command, models)


@pytest.mark.parametrize("words", ["serve serve deepseek-ai/DeepSeek-V3.2", "serve m --tensor-paralel-size 8"])
def test_a_typo_is_seen(words, serve_parser, models):
    with pytest.raises(SystemExit):
        engine_config(serve_parser, parse_command(f"vllm {words}"), models)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_and_variables_are_explained(page):
    commands = [command for command in page.commands if command.starts_with("vllm", "serve")]
    used = {name for command in commands for name in (*command.flags, *command.variables)}
    assert used <= page.explained, sorted(used - page.explained)


def test_what_is_not_explained_is_seen(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("```bash\nvllm serve m --port 1 --host h\n```\n- `--port 1`: which port, see `--host`.\n")
    page = Page(path)
    assert page.commands[0].flags == ["--port", "--host"]
    assert page.explained == {"--port"}


@pytest.mark.parametrize("page", pages(clients=True), ids=name_of)
def test_flags_in_the_text_exist(page, serve_parser):
    """Inline code that begins with a flag is one of `vllm serve`, of memory.py, or of the doctor."""
    for code in page.inline_code:
        if code.startswith("--") and code not in ("--gpu-gib", "--json"):
            words = parse_command(code.replace("KEY", "k")).words
            if len(words) == 1 and serve_parser._option_string_actions[words[0]].nargs != 0:
                continue  # named without a value
            serve_parser.parse_args(["model", *words])


@pytest.mark.parametrize("page", pages(clients=True), ids=name_of)
def test_variables_exist(page):
    for name in variables_in(page.text):
        assert name in environment_variables or name in OTHER_VARIABLES, name


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: str(page.path.relative_to(ROOT)))
def test_commands_are_shell(page):
    for language, code in page.blocks:
        assert language in ("bash", "text"), f"a block of unknown language {language!r}"
        if language == "bash":
            checked = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True)
            assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: str(page.path.relative_to(ROOT)))
def test_our_own_commands_are_accepted(page):
    for command in page.commands:
        if command.starts_with("vllm-dsv32"):
            cli._parser().parse_args(command.words[1:])
        elif command.starts_with("python"):
            assert (ROOT / command.words[1]).is_file()


@pytest.mark.parametrize("page", [README, *pages(clients=True)], ids=lambda page: str(page.path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.prose):
        path = (page.path.parent / target).resolve() if target else page.path
        assert path.exists(), target
        headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in anchors, f"{target}#{anchor}"


def test_every_page_is_in_the_index_and_says_what_was_measured():
    index = Page(RECIPES / "README.md")
    for page in pages(clients=True):
        if page.path.name != "README.md":
            assert f"]({page.path.name})" in index.text, page.path.name
        if page.path.name not in ("README.md", "clients.md"):
            assert "\n## Measured\n" in page.text, page.path.name


def test_results_of_memory_are_what_it_prints(capsys):
    num_results = 0
    for page in PAGES:
        for (_, code), (language, result) in pairwise(page.blocks):
            if language == "text":
                assert code.startswith("python recipes/memory.py")
                assert memory.main(parse_command(code).words[2:]) == 0
                assert capsys.readouterr().out == result, f"{page.path.name}: {code}"
                num_results += 1
    assert num_results == sum(language == "text" for page in PAGES for language, _ in page.blocks) > 0


def test_changed_defaults_are_those_of_startup():
    page = Page(RECIPES / "settings.md")
    (rows,) = [table[1:] for table in page.tables if table[0][0] == "setting"]
    changes = [startup._WARMUP, startup._SAMPLER, startup._LINEAR]
    assert [row[0].strip("`") for row in rows] == [change.setting for change in changes]
    assert [re.findall(r"`([^`]+)`", row[1])[0] for row in rows] == [change.value for change in changes]
    assert [row[4].strip("`") for row in rows] == [change.undo for change in changes]
    assert [f"SM {major}0" for major in startup._JIT_LINEAR_CAPABILITIES] == rows[2][2].split(", ")


def test_kernels_are_those_of_the_table():
    page = Page(RECIPES / "settings.md")
    (rows,) = [table[1:] for table in page.tables if table[0][0] == "operation"]
    written = {row[0].strip("`"): tuple(re.findall(r"`(\w+)`", cell) for cell in row[1:3]) for row in rows}
    of = {operation: [row for row in KERNELS if row.operation == operation] for operation in OPERATIONS}
    assert written == {
        operation: (
            [row.name for row in found if not row.by_name_only],
            [row.name for row in found if row.by_name_only],
        )
        for operation, found in of.items()
    }


def test_additional_config_is_accepted_and_its_kernels_exist(serve_parser):
    """In commands and in the text."""
    codes = [code for page in PAGES for code in page.inline_code if code.startswith("--additional-config ")]
    named = [parse_command(code).words for code in codes]
    named += [command.words for _, command in SERVE_COMMANDS if "--additional-config" in command.words]
    assert len(named) > 1
    known = {(row.operation, row.name) for row in KERNELS}
    for words in named:
        value = words[words.index("--additional-config") + 1]
        config = VllmConfig(additional_config=json.loads(value))
        shared_selection_from(config)
        assert plugin_options(config)
        assert set(kernel_overrides(config).items()) <= known
