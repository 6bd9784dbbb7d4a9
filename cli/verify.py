"""`gazepatch verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from gazepatch.cli.output import json_option, plain, print_json, print_table

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPT = "Describe this image."
TEST_IMAGE_PX = 448


@click.command("verify")
@click.argument("model")
@click.argument("images_and_prompt", metavar="[IMAGE... PROMPT]", nargs=-1)
@json_option
def command(model: str, images_and_prompt: tuple[str, ...], as_json: bool) -> None:
    """Prove on MODEL that patching does no harm and can be undone.

    Asks about a test image where no IMAGE is given. Exit status 1 when a promise is not kept.
    """
    *images, prompt = images_and_prompt or (PROMPT,)
    for image in images:
        click.Path(exists=True, dir_okay=False).convert(image, None, click.get_current_context())

    import gazepatch
    from gazepatch.cli.opening import open_model, prompt_inputs

    patched, processor = open_model(model)
    report = gazepatch.verify(patched, prompt_inputs(patched, processor, images or [_test_image()], prompt))
    if as_json:
        checks = [plain(check) | {"passed": check.passed} for check in report.checks]
        print_json({"passed": report.passed, "checks": checks})
    else:
        rows = [
            ("ok" if c.passed else "FAILED", c.name, f"{c.value:.3g}", f"{c.limit:.3g}", c.note) for c in report.checks
        ]
        print_table(("", "promise", "measured", "limit", ""), rows)
    if not report.passed:
        raise click.exceptions.Exit(1)


def _test_image() -> Image:
    """Colours and edges everywhere, so that no two patches look alike."""
    from PIL import Image

    image = Image.new("RGB", (TEST_IMAGE_PX, TEST_IMAGE_PX))
    for y in range(TEST_IMAGE_PX):
        for x in range(TEST_IMAGE_PX):
            image.putpixel((x, y), (x * 255 // TEST_IMAGE_PX, y * 255 // TEST_IMAGE_PX, x * y // 7 % 256))
    return image
