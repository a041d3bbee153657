"""The config file and the commands about it; completion of the command line."""

from __future__ import annotations

import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpumem_tui.engine.config import UserError
from gpumem_tui.tui.cli import COMMANDS, main, parser
from gpumem_tui.tui.commands.app import tour_note
from gpumem_tui.tui.commands.completion import SHELLS, commands
from gpumem_tui.tui.settings import NO_HOME, OPTIONS, Settings, config_path, with_key, without_key

from .app_driver import Oracle, shown, trained


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def written(home: Path, text: str) -> Path:
    path = home / "config" / "gpumem-tui" / "config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_without_a_file_there_are_the_defaults(home: Path) -> None:
    settings = Settings.load()
    assert {option.name: settings[option.name] for option in OPTIONS} == {o.name: o.default for o in OPTIONS}
    assert settings.path == home / "config" / "gpumem-tui" / "config.toml"


def test_a_relative_xdg_folder_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "here")
    assert config_path() == Path.home() / ".config" / "gpumem-tui" / "config.toml"


def test_a_file_is_read(home: Path) -> None:
    written(home, 'theme = "light"\nrefresh = 4\nmouse = true\n[keys]\nsave = "S"\nstep.zoom-in = ["+", "a"]\n')
    settings = Settings.load()
    assert (settings["theme"], settings["refresh"], settings["mouse"]) == ("light", 4.0, True)
    assert settings.keys == {"save": ("S",), "step.zoom-in": ("+", "a")}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('theme = "blue"\n', ("theme=blue", "auto, dark, light, ansi")),
        ("refresh = 100\n", ("refresh=100", "60")),
        ("thme = 1\n", ("'thme'", "did you mean theme")),
        ("theme = \n", ("line 1",)),
        ("[keys]\nsave = 3\n", ("keys.save", "a key")),
        ("keys = 3\n", ("keys takes a table",)),
    ],
)
def test_what_cannot_be_is_one_line_that_names_file_and_key(home: Path, text: str, names: tuple[str, ...]) -> None:
    path = written(home, text)
    with pytest.raises(UserError) as caught:
        Settings.load()
    line = str(caught.value)
    assert line.startswith(str(path))
    assert "\n" not in line
    for name in names:
        assert name in line


def test_setting_one_key_leaves_the_rest_of_the_file_as_it_is(home: Path) -> None:
    path = written(home, '# mine\ntheme = "dark" # old\n\n[keys]\nsave = "S"\n')
    settings = Settings.load()
    settings.set("theme", "light")
    settings.set("units", "GB")
    settings.set("keys.step.zoom-in", "+ a")
    settings.set("keys.save", "ctrl+w")
    assert path.read_text() == (
        '# mine\ntheme = "light"\nunits = "GB"\n\n[keys]\nsave = "S"\n'.replace('save = "S"', '"save" = "ctrl+w"')
        + '"step.zoom-in" = ["+", "a"]\n'
    )
    again = Settings.load()
    assert again.keys == {"save": ("ctrl+w",), "step.zoom-in": ("+", "a")}
    assert not list(path.parent.glob(".config.*"))


def test_a_key_is_put_into_a_file_that_has_no_such_table() -> None:
    assert with_key("", "", "a", "1") == "a = 1\n"
    assert with_key("a = 1\n", "keys", "b", '"x"') == 'a = 1\n\n[keys]\nb = "x"\n'
    assert with_key("[keys]\nb = 1\n", "", "a", "2") == "a = 2\n[keys]\nb = 1\n"


async def test_what_is_set_in_the_app_persists(home: Path) -> None:
    async with shown(trained(), settings=Settings.load()) as driver:
        await driver.press("v", "g")
        assert "units GB" in driver.text
        assert "MB" in driver.line("MB")
    settings = Settings.load()
    assert (settings["theme"], settings["units"]) == ("dark", "GB")
    async with shown(trained(), settings=settings) as driver:
        assert driver.line("MB")


async def test_predictions_are_cancelled_and_stay_off_until_they_are_wanted_again(home: Path) -> None:
    oracle = Oracle(lambda config: (100 - 50 * bool(config["lora"])) << 20)
    async with shown(trained(), settings=Settings.load(), predictions=oracle) as driver:
        assert "saves most" in driver.text
        await driver.press("P")
        assert oracle.dropped
        assert "predict off" in driver.text
        assert "saves most" not in driver.text
        await driver.press("4")
        assert "~" not in driver.text
    assert Settings.load()["predict"] is False
    async with shown(trained(), settings=Settings.load(), predictions=oracle) as driver:
        assert "saves most" not in driver.text
        await driver.press("P")
        assert "saves most" in driver.text


@pytest.mark.parametrize("screen", ["1", "4"])
async def test_what_is_still_worked_out_goes_at_once_when_predictions_are_cancelled(screen: str) -> None:
    """Nothing is known yet, before and after: it is drawn anew all the same."""
    source = trained()
    source.live = False
    async with shown(source, predictions=Oracle(lambda config: None)) as driver:
        await driver.press(screen)
        assert "working out what saves most" in driver.text
        await driver.press("P", "escape")
        assert "working out" not in driver.text
        await driver.press("P", "escape")
        assert "working out what saves most" in driver.text


async def test_where_nothing_can_be_written_it_holds_for_the_session() -> None:
    async with shown(trained()) as driver:
        await driver.press("g")
        assert "for this session only" in driver.text
        assert driver.line("MB")


@pytest.mark.parametrize("key", ["escape", "2"])
async def test_the_tour_is_begun_with_until_it_has_been_left(home: Path, key: str) -> None:
    note = tour_note()
    assert note is not None
    async with shown(trained(), tour=note.touch) as driver:
        await driver.press("enter")
        assert tour_note() == note, "whoever is interrupted in it sees it again"
        await driver.press(key)
        assert tour_note() is None


def test_where_it_cannot_be_noted_there_is_no_tour(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/none")
    assert tour_note() is None


async def test_the_tour_goes_through_its_stops_and_ends() -> None:
    async with shown(trained(), tour=lambda: None) as driver:
        seen = []
        while driver.app.board.tour is not None:
            seen.append(next(line for line in driver.lines if line.startswith(" tour")))
            await driver.press("enter")
        assert [line.split()[1] for line in seen] == ["1", "2", "3", "4", "5"]
        await driver.press("w")
        assert "tour 1 of 5" in driver.text
        await driver.press("escape")
        assert "tour" not in driver.text


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 40)])
async def test_the_tour_hides_nothing_that_it_talks_about(size: tuple[int, int]) -> None:
    oracle = Oracle(lambda config: (100 - 50 * bool(config["lora"])) << 20)
    async with shown(trained(3, checkpointing="layers"), size, predictions=oracle) as driver:
        sentence = driver.line("The peak is")
        await driver.press("w")
        while driver.app.board.tour is not None:
            assert driver.line("cpu ")
            assert sentence in driver.lines
            assert "saves most" in driver.text
            assert "recomputed; layer" in driver.text
            assert driver.lines[-3].startswith(" tour")
            assert "enter" in driver.lines[-2]
            await driver.press("enter")


async def test_a_key_that_is_not_the_tours_ends_it_and_does_what_it_does(tmp_path: Path) -> None:
    async with shown(trained(), save_dir=tmp_path, tour=lambda: None) as driver:
        for key, seen in (("s", "saved"), ("2", "largest now"), ("down", "▸")):
            await driver.press("w", key)
            assert "tour" not in driver.text.replace(str(tmp_path), "")
            assert seen in driver.text
        await driver.press("escape", "w")
        driver.source.fail(text="it broke")
        await driver.tick()
        await driver.tick()
        assert "it broke" in driver.text, "what has gone wrong is not hidden either"


async def test_the_tour_waits_for_its_reader_and_goes_on_where_it_was_left() -> None:
    async with shown(trained(), tour=lambda: None) as driver:
        await driver.press("enter")
        driver.source.finish_step()
        await driver.tick()
        assert "tour 2 of 5" in driver.text
        await driver.press("2")
        assert "tour" not in driver.text
        await driver.press("w")
        assert "tour 2 of 5" in driver.text
        driver.source.fail(text="it broke")
        await driver.tick()
        assert "it broke" in driver.text, "what has gone wrong is not hidden"
        await driver.press("escape")
        assert "tour" not in driver.text


async def test_back_at_the_rate_that_suits_the_link_it_is_the_automatic_one_again(home: Path) -> None:
    async with shown(trained(), settings=Settings.load()) as driver:
        driver.app.refresh_hz = 10.0
        await driver.press("[")
        assert Settings.load()["refresh"] == 4.0
        await driver.press("]")
        assert Settings.load()["refresh"] == 0.0
        assert "10 refreshes a second, as the link suggests" in driver.text


def test_a_key_is_taken_out_and_the_rest_stays() -> None:
    text = '# mine\na = 1\n\n[keys]\n"b" = 2\nc = 3\n'
    assert without_key(text, "", "a") == '# mine\n\n[keys]\n"b" = 2\nc = 3\n'
    assert without_key(text, "keys", '"b"') == "# mine\na = 1\n\n[keys]\nc = 3\n"
    for table, key in (("", "c"), ("keys", "a"), ("other", "a")):
        assert without_key(text, table, key) == text


@pytest.mark.parametrize(
    "text",
    [
        "refresh = " + "9" * 5000, "refresh = 0x" + "f" * 5000, "refresh = inf", "theme = " + "[" * 2000 + "]" * 2000,
        "mouse = 0x" + "f" * 5000, 'gpu = "A100\\nH100"', 'profile = "\\u001b[2J"', "keys = 0x" + "f" * 5000,
        "[keys]\n" + "a." * 5_000 + 'b = 1', '[keys]\n"x\\ny" = 1', "\"x\\ny\" = 1", "x = 1\nx = 1",
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_whatever_is_in_the_file_is_one_line(home: Path, text: str) -> None:
    written(home, text)
    with pytest.raises(UserError) as refused:
        Settings.load()
    line = str(refused.value)
    assert line.startswith(str(home)) and line.isprintable() and len(line) <= 2000


# --- without a home ---------------------------------------------------------------


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container run as a user that passwd does not know."""
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])


def test_without_a_home_settings_hold_for_the_session(homeless: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert config_path() is None
    assert tour_note() is None
    settings = Settings.load()
    with pytest.raises(UserError, match="there is no home folder"):
        settings.set("units", "GB")
    assert settings["units"] == "GB"
    assert main(["config"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"# {NO_HOME}; what is set holds for one session only"
    for words in (["path"], ["edit"], ["set", "units=GB"], ["unset", "units"]):
        assert main(["config", *words]) == 2
        assert capsys.readouterr().err == f"gpumem-tui: {NO_HOME}\n"


async def test_without_a_home_the_app_says_that_what_is_set_does_not_last(homeless: None) -> None:
    async with shown(trained(), settings=Settings.load()) as driver:
        await driver.press("g")
        assert "for this session only: there is no home folder" in driver.text


# --- the command ------------------------------------------------------------------


def test_what_is_set_can_be_cleared_and_unset(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "set", "gpu=A100", "theme=light", "keys.save=S"]) == 0
    assert main(["config", "set", "gpu="]) == 0
    assert main(["config", "unset", "theme", "keys.save"]) == 0
    settings = Settings.load()
    assert (settings["gpu"], settings["theme"], settings.keys) == ("", "auto", {})
    assert main(["config", "unset", "thme"]) == 2
    assert "did you mean theme" in capsys.readouterr().err


def test_editing_where_nothing_can_be_written_is_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/proc/self/nothing")
    assert main(["config", "edit"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("gpumem-tui: /proc/self/nothing/gpumem-tui/config.toml: cannot be written: ")
    assert said.count("\n") == 1


def test_config_shows_sets_and_says_where(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "path"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert main(["config", "set", "theme=light", "keys.save=S ctrl+w", "refresh=4"]) == 0
    assert main(["config"]) == 0
    shown_text = capsys.readouterr().out
    assert "theme = light" in shown_text
    assert "keys.save = S ctrl+w" in shown_text
    assert path.exists()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["set", "theme"], "key=value"), (["set", "theme=blue"], "gpumem-tui: config: theme=blue is not allowed"),
        (["set", "keys.foo=x"], "gpumem-tui: config: keys.foo: there is no such action; "),
        (["set", "x=1"], "no setting 'x'"),
        (["set", "keys.save=q"], "q is quit's already"), (["set", "profile=gpt9"], "gpt9"),
    ],
)  # fmt: skip
def test_config_refuses_what_cannot_be(
    home: Path, capsys: pytest.CaptureFixture[str], words: list[str], problem: str
) -> None:
    assert main(["config", *words]) == 2
    said = capsys.readouterr().err
    assert problem in said
    assert len(said.splitlines()) == 1
    assert not config_path().exists(), "what is refused is not written"


def test_config_edit_opens_the_editor_on_a_file_that_explains_itself(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDITOR", f"{sys.executable} -c \"import sys; open(sys.argv[1], 'a').write('save = 3')\"")
    monkeypatch.delenv("VISUAL", raising=False)
    assert main(["config", "edit"]) == 2
    assert "keys.save takes a key" in capsys.readouterr().err
    text = config_path().read_text()
    for option in OPTIONS:
        assert option.summary in text


def test_the_profile_setting_is_what_is_trained(home: Path) -> None:
    from gpumem_tui.tui.commands.common import config_from

    flags = parser().parse_args([])
    assert config_from(flags, profile="gpt2").model == "gpt2"
    assert config_from(parser().parse_args(["--profile", "tiny"]), profile="gpt2").model == "tiny"


# --- completion ----------------------------------------------------------------------


@pytest.mark.parametrize("shell", list(SHELLS))
def test_completion_knows_every_command_and_flag(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for command in commands(parser()):
        for word, _ in command.words:
            assert word.removeprefix("--") in script
    for name, _, _ in COMMANDS:
        assert name in script
    interpreter = shutil.which(shell)
    if interpreter is not None:
        checked = subprocess.run([interpreter, "-n"], input=script, text=True, capture_output=True, check=False)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("gpumem-tui sw", {"sweep"}), ("gpumem-tui --preset low", {"low-memory"}),
        ("gpumem-tui config s", {"show", "set"}),
        ("gpumem-tui run --profile tin", {"tiny"}), ("gpumem-tui sweep --format j", {"json"}),
        ("gpumem-tui run --workload g", {"generate"}),
        ("gpumem-tui config set prof", {"profile="}), ("gpumem-tui completion z", {"zsh"}),
        ("gpumem-tui config set theme = d", {"dark"}),
        ("gpumem-tui estimate --gpu H1", {"H100-80GB", "H100-PCIe-80GB"}),
        ("gpumem-tui --set learn", {"learning_rate="}), ("gpumem-tui --set lora =", {"on", "off"}),
        ("gpumem-tui run --set quantization = nf", {"nf4"}),
        ("gpumem-tui run --set quantization=nf", {"quantization=nf4"}),
    ],
)  # fmt: skip
def test_bash_completes(typed: str, expected: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", "bash"])
    words = typed.split()
    script = capsys.readouterr().out + f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}\n"
    script += "_gpumem_tui; printf '%s\\n' \"${COMPREPLY[@]}\"\n"
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, check=True)
    assert set(done.stdout.split()) == expected
