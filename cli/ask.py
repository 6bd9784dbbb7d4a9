import click


@click.command("ask")
def command() -> None:
    """x"""
