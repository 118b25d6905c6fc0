"""T2I-CompBench's layout: one folder of pictures whose names are their prompts.

Read from Readme.md, GORS_finetune/inference_eval.py and the scorers (see `CompBench.source`): a
picture's prompt is what stands before the first `_` of its name, its number what follows the last.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from flux_jax.errors import UserError
from flux_jax.scorers.layout import Item, Layout, lines_of

# Of a file's name on every common disk.
_NAME_BYTES = 255

_BLIP = "cd BLIPvqa_eval && python BLIP_vqa.py --out_dir={folder}"
_SPATIAL = "cd UniDet_eval && python 2D_spatial_eval.py --outpath {folder}"
_CLIP = "python CLIPScore_eval/CLIP_similarity.py --outpath {folder}"
# The scorer of each category, by the name of its prompt file.
_SCORERS = {
    "3d_spatial": ("cd UniDet_eval && python 3D_spatial_eval.py --outpath {folder}",),
    "non_spatial": (_CLIP,),
    "spatial": (_SPATIAL,),
    "numeracy": ("cd UniDet_eval && python numeracy_eval.py --outpath {folder}",),
    "color": (_BLIP,),
    "shape": (_BLIP,),
    "texture": (_BLIP,),
    "complex": (
        _BLIP,
        _SPATIAL + " --complex True",
        _CLIP + " --complex True",
        "cd 3_in_1_eval && python 3_in_1.py --outpath={folder}",
    ),
}


class CompBench(Layout):
    """`samples/{prompt}_{number:06}.png`, numbered over all prompts."""

    title = "T2I-CompBench"
    samples = 10
    source = "Karine-Huang/T2I-CompBench@1b7094991a57f3c22abdd4f6e8ba6c1a15517073"

    def read(self, path: Path) -> list[Item]:
        """`color_val.txt` and the like: a prompt a line, up to a tab."""
        items = []
        for number, line in enumerate(lines_of(path), 1):
            prompt = line.split("\t")[0]
            for character, what in (("_", "ends the prompt"), ("/", "is no part of a name")):
                if character in prompt:
                    raise UserError(
                        f"{path}, line {number}: has a {character!r}, which {what} in the file "
                        f"names of T2I-CompBench: {prompt!r}"
                    )
            if not prompt.strip():
                raise UserError(f"{path}, line {number}: is no prompt: {line[:40]!r}")
            # Pictures are written under a longer name first, with the process's number and more.
            if len(f".{prompt}_000000.png.partial-0000000-00000000".encode()) > _NAME_BYTES:
                raise UserError(f"{path}, line {number}: is too long for a file's name")
            items.append(Item(name=f"{number - 1:05d}", prompt=prompt))
        return items

    def file(self, index: int, item: Item, sample: int, samples: int) -> str:
        return f"samples/{item.prompt}_{index * samples + sample:06d}.png"

    def commands(self, folder: Path, prompts: Path, *, samples: int, side: int) -> list[str]:
        del side
        found = next(
            (lines for name, lines in _SCORERS.items() if prompts.stem.startswith(name)), ()
        )
        if not found:
            return [f"# {prompts.name} is of no known category; see the scorer's Readme.md"]
        commands = [f"({line.format(folder=shlex.quote(str(folder)))})" for line in found]
        if len(found) > 1 and samples != self.samples:
            commands.append(f"# the last one wants {self.samples} pictures a prompt, not {samples}")
        return commands
