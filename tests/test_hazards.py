"""What counts as a register that is written too early, in machine code of a few lines."""

import re
import textwrap

import pytest

from tools.hazards import hazards


def loop(body: str) -> str:
    """A kernel whose loop is `body`, an instruction a line, as `nvdisasm` prints it."""
    lines = [".text.kernel:", "        /*0000*/  MOV R1, R2 ;", ".L_x_1:"]
    body = textwrap.dedent(body).strip()
    for place, line in enumerate([*body.splitlines(), "@!P1 BRA `(.L_x_1)"]):
        lines.append(f"    -:-:-:Y:01        /*{16 * (place + 1):04x}*/   {line} ;")
    return "\n".join(lines)


# Decodes into R152, and multiplies by it and the three registers after it.
MULTIPLY = """
LOP3.LUT R152, R12, 0x3030303, RZ, 0xc0, !PT
WARPGROUP.ARRIVE
IGMMA.64x128x32.S8.S8 R24, R152, gdesc[UR28], R24, gsb0
"""


def test_decoding_into_what_the_round_before_still_reads():
    found = hazards(loop(MULTIPLY + "WARPGROUP.DEPBAR.LE gsb0, 0x1"))
    assert [one.text[:14] for one in found] == ["LOP3.LUT R152,"]
    assert not hazards(loop(MULTIPLY + "WARPGROUP.DEPBAR.LE gsb0, 0x0"))


def test_two_sets_of_registers_need_only_the_older_product_to_be_over():
    other = re.sub("R152", "R156", MULTIPLY)
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    assert not hazards(loop(f"{MULTIPLY}{wait}{other}{wait}"))
    assert len(hazards(loop(f"{MULTIPLY}{other}{wait}"))) == 1


@pytest.mark.parametrize(
    ("instruction", "count"),
    [
        ("LDSM.16.M88.4 R150, [R17]", 1),
        ("LDSM.16.M88.4 R148, [R17]", 0),
        ("@P2 IMAD.WIDE R151, R1, R2, R3", 1),
        ("LD.E.64 R155, desc[UR14][R12.64]", 1),
        ("STS [R152], R153", 0),
        ("STG.E.64 desc[UR4][R2.64], R152", 0),
        ("ST.E R152, R1", 0),
        ("FADD R156, R152, R153", 0),
    ],
)
def test_what_an_instruction_writes(instruction, count):
    multiply = MULTIPLY.replace("LOP3.LUT R152", "LOP3.LUT R10")
    assert len(hazards(loop(f"{multiply}{instruction}"))) == count


def test_a_product_that_has_only_begun_is_running():
    body = """
    IGMMA.64x128x32.S8.S8 R24, R152, gdesc[UR28], R24
    MOV R155, R1
    IGMMA.64x128x32.S8.S8 R24, R160, gdesc[UR28], R24, gsb0
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    """
    assert [one.text for one in hazards(loop(body))] == ["MOV R155, R1"]


def test_operands_in_shared_memory_and_code_outside_of_loops_are_free():
    shared = "HGMMA.64x128x16.F32.BF16 R88, gdesc[UR8], R88, gsb0\nMOV R88, R1"
    assert not hazards(loop(shared))
    straight = loop(MULTIPLY + "MOV R152, R1").replace(".L_x_1:", "")
    assert not hazards(straight)
