"""What the app shows of how it stands to the engine: asking when it is quit, looking only, left alone."""

from __future__ import annotations

import pytest

from gpumem_tui.engine.feed import Command, End, Pause, Save, Start, TakeOver, ViewerRole
from gpumem_tui.engine.run_events import EngineEnded
from gpumem_tui.tui.app import GpumemApp

from .fake_source import FakeSource


class Attached(FakeSource):
    """A fake source that keeps what it is told."""

    def __init__(self, role: ViewerRole) -> None:
        super().__init__()
        self.role = role
        self.told: list[Command] = []

    def command(self, command: Command) -> None:
        self.told.append(command)
        if isinstance(command, TakeOver):
            self.role = ViewerRole.ATTACHED
        elif not isinstance(command, End):
            super().command(command)


def shown(app: GpumemApp) -> str:
    return "\n".join("".join(segment.text for segment in app.canvas.render_line(y)) for y in range(app.size.height))


def source(role: ViewerRole) -> Attached:
    made = Attached(role)
    made.start()
    made.finish_step()
    return made


@pytest.mark.parametrize(
    ("answer", "ends", "stays"), [("d", False, False), ("x", True, False), ("escape", False, True)]
)
async def test_quitting_asks_what_becomes_of_the_run(answer: str, ends: bool, stays: bool) -> None:
    engine = source(ViewerRole.ATTACHED)
    app = GpumemApp(engine, refresh_hz=0)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("q")
        assert "d detach, the run goes on · x stop the run and quit · esc stay" in shown(app)
        await pilot.press(answer)
        assert app.ended is ends
        assert (End() in engine.told) is ends
        assert (app.return_code is None) is stays
        if stays:
            assert "esc stay" not in shown(app)
    assert not any(isinstance(command, Pause) for command in engine.told), "an answer is no other key as well"


@pytest.mark.parametrize("case", ["between two runs", "paused between two runs", "another run on the screens"])
async def test_quitting_asks_about_the_run_there_is_and_not_about_the_one_that_is_seen(case: str) -> None:
    engine = source(ViewerRole.ATTACHED)
    app = GpumemApp(engine, refresh_hz=0)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("r")
        engine.end("stopped")
        app.tick()
        if case != "between two runs":
            if "paused" in case:
                await pilot.press("space")
                assert "the view is paused before the restart can be seen" in shown(app)
            engine.obey()
            app.tick()
        if case == "another run on the screens":
            app.control.look_at_run(app.state.run_list.runs[0])
            assert not app.state.run.running
        await pilot.press("q")
        assert "d detach, the run goes on" in shown(app), shown(app)
        assert "view paused" not in shown(app)
        assert (app.return_code, engine.told) == (None, [Start(app.state.config)])


@pytest.mark.parametrize("key", ["r", "l", "x"])
async def test_a_paused_view_goes_on_with_what_is_told_the_engine(key: str) -> None:
    engine = source(ViewerRole.ATTACHED)
    app = GpumemApp(engine, refresh_hz=0)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("space")
        assert "view paused" in shown(app)
        await pilot.press(key)
        assert "view paused" not in shown(app) and len(engine.told) == 1
        assert ("stopping" if key == "x" else "restarting") in shown(app).splitlines()[0]


async def test_ctrl_c_in_the_first_seconds_is_the_end_without_a_question() -> None:
    app = GpumemApp(source(ViewerRole.ATTACHED), refresh_hz=0)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("ctrl+c")
        assert (app.return_code, app.interrupted) == (130, True)


@pytest.mark.parametrize("role", [ViewerRole.ATTACHED, ViewerRole.READ_ONLY])
async def test_ctrl_c_asks_once_there_is_a_run_to_lose_and_is_an_answer(
    role: ViewerRole,
) -> None:
    """From the start, if the app has not started the engine."""
    engine = source(role)
    app = GpumemApp(engine, refresh_hz=0, started=False)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("ctrl+c")
        if role is ViewerRole.ATTACHED:
            assert "x stop the run and quit" in shown(app)
            assert app.return_code is None
            await pilot.press("ctrl+c")
        assert app.return_code == 130
    assert engine.told == ([End()] if role is ViewerRole.ATTACHED else [])


async def test_quitting_during_the_tour_asks_where_it_can_be_seen() -> None:
    app = GpumemApp(source(ViewerRole.ATTACHED), refresh_hz=0, tour=lambda: None)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("q")
        assert "d detach" in shown(app)
        assert "tour" not in shown(app)


@pytest.mark.parametrize("role", list(ViewerRole))
async def test_the_row_of_keys_offers_to_restart_to_who_commands(role: ViewerRole) -> None:
    app = GpumemApp(source(role), refresh_hz=0)
    async with app.run_test(size=(80, 24)):
        assert ("and restarts" in shown(app)) == (role in (ViewerRole.OWNER, ViewerRole.ATTACHED))


@pytest.mark.parametrize("role", [ViewerRole.OWNER, ViewerRole.READ_ONLY, ViewerRole.WATCHING, ViewerRole.GONE])
async def test_where_the_run_does_not_depend_on_it_quitting_asks_nothing(role: ViewerRole) -> None:
    engine = source(role)
    app = GpumemApp(engine, refresh_hz=0)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("q")
        assert app.return_code == 0
    assert engine.told == []


async def test_one_who_may_only_look_sees_so_and_can_take_over() -> None:
    engine = source(ViewerRole.READ_ONLY)
    app = GpumemApp(engine, refresh_hz=0)
    async with app.run_test(size=(80, 24)) as pilot:
        app.tick()
        await pilot.pause()
        assert "read-only" in shown(app).splitlines()[-1]
        await pilot.press("!")
        assert engine.told == [TakeOver()]
        assert "this viewer commands now" in shown(app)
        assert "read-only" not in shown(app).splitlines()[-1]
        await pilot.press("!")
        assert "nobody else commands" in shown(app)


async def test_one_who_loses_the_command_is_told() -> None:
    engine = source(ViewerRole.ATTACHED)
    app = GpumemApp(engine, refresh_hz=0)
    async with app.run_test(size=(80, 24)):
        engine.role = ViewerRole.READ_ONLY
        app.tick()
        assert "another viewer commands this engine now, this one looks on; ! takes over" in shown(app)
        await app.run_action("press('escape')")
        app.tick()
        assert "another viewer commands" not in shown(app), "it is said once"


async def test_an_engine_that_was_ended_has_not_failed() -> None:
    engine = source(ViewerRole.READ_ONLY)
    app = GpumemApp(engine, refresh_hz=0)
    async with app.run_test(size=(80, 24)):
        app.tick()
        engine.role = ViewerRole.GONE
        engine.end("stopped")
        engine.feed.tell(EngineEnded(text="the engine was ended by somebody; q quits", by="somebody"))
        app.tick()
        assert shown(app).startswith(" ■ ended")
        assert "the engine was ended by somebody; q quits" in shown(app)
        assert app.state.message is not None and not app.state.message.problem


async def test_a_script_that_is_done_and_gone_has_not_failed() -> None:
    engine = source(ViewerRole.WATCHING)
    app = GpumemApp(engine, refresh_hz=0)
    async with app.run_test(size=(80, 24)):
        engine.role = ViewerRole.GONE
        engine.end("done")
        engine.feed.tell(EngineEnded(text="the engine's process 7 has ended; q quits", detail="x"))
        app.tick()
        assert app.state.status == "done"


@pytest.mark.parametrize(
    ("role", "gone", "said"),
    [
        (ViewerRole.OWNER, False, "enter applies 1 change as one restart"),
        (ViewerRole.READ_ONLY, False, "1 change collected; another viewer commands"),
        (ViewerRole.WATCHING, False, "1 change collected; enter says where the script sets it"),
        (ViewerRole.GONE, False, "enter applies 1 change as one restart"),
        (ViewerRole.GONE, True, "1 change collected; the engine has gone"),
    ],
)
async def test_a_change_collected_says_what_can_be_done_with_it(role: ViewerRole, gone: bool, said: str) -> None:
    engine = source(role)
    engine.gone = gone
    app = GpumemApp(engine, refresh_hz=0)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("4", "k")
        assert said in shown(app)


async def test_an_engine_that_has_gone_is_said_and_r_starts_the_run_again() -> None:
    engine = source(ViewerRole.ATTACHED)
    app = GpumemApp(engine, refresh_hz=0)
    async with app.run_test(size=(80, 24)) as pilot:
        engine.role = ViewerRole.GONE
        engine.feed.tell(EngineEnded(text="the engine's process 7 has ended (killed by SIGKILL); s saves", detail="x"))
        app.tick()
        await pilot.pause()
        assert "killed by SIGKILL" in shown(app)
        assert "engine gone" in shown(app).splitlines()[-1]
        assert app.state.status == "failed"
        await pilot.press("s", "r")
        assert [type(command) for command in engine.told] == [Save, Start]
