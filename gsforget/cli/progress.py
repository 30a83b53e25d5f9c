"""The progress bar of `forget`: losses, validation accuracies and active groups, live, on stderr."""

from __future__ import annotations

from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from gsforget.cli.output import stderr_console

STAGES = {
    "before": "measuring the original",
    "select": "selecting blocks",
    "settle": "settling",
    "merge": "merging and measuring",
}


class ForgetProgress:
    """Context manager; call it with the events of the forgetting loop."""

    def __init__(self) -> None:
        console = stderr_console()
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.watched = ""

    def __enter__(self) -> ForgetProgress:
        self.bar.start()
        self.task = self.bar.add_task("reading images", total=None, numbers="")
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        stage = event["stage"]
        if stage == "validate":
            self.watched = f" · validation: forget {_percent(event['forget'])}, retain {_percent(event['retain'])}"
        elif stage in ("select", "settle"):
            numbers = (
                f"step {event['step']} · loss retain {event['retain_loss']:.3f}, forget {event['forget_loss']:.3f}"
                f" · blocks {event['active']} (target {event['target']}){self.watched}"
            )
            fraction = event["fraction"]
            total, done = (None, 0) if fraction is None else (1.0, fraction)
            self.bar.update(self.task, description=STAGES[stage], numbers=numbers, total=total, completed=done)
        else:
            self.bar.update(self.task, description=STAGES[stage], numbers=self.watched.removeprefix(" · "), total=None)


def _percent(value: float | None) -> str:
    return "none held out" if value is None else f"{value:.1f} %"
