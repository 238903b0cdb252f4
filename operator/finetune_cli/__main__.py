"""Entry point of `finetune`. One module per subcommand group; heavy imports happen inside the commands."""

from __future__ import annotations

import typer

from finetune_cli import job_planning, jobs, local, rollouts

app = typer.Typer(
    name="finetune",
    help="Fine-tune language models on Kubernetes, bring the adapters to users, and run the whole stack on a laptop.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(jobs.app, name="jobs")
app.add_typer(rollouts.app, name="rollout")
app.add_typer(local.app, name="local")
app.command("plan")(job_planning.plan)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
