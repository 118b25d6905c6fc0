"""What of each benchmark's figures is shown, and under which names."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How one benchmark is shown.

    Attributes:
      title: what was measured; the table's first heading.
      how: what the figures are, before the name of the device.
      rows: (figure, label), in order. Figures that are not named here are left out.
      columns: (measure, label), in order, for figures that are called `row/measure`; the rows are
        then theirs, in the order of the file, and the peers'.
      targets: (figure, label, of the paper, what is to be reached), shown first, as a table.
      compared: (label, limit, what is to be reached, figure of each variant), shown alone.
      variants: the headings of those figures.
      image: of docs/images, shown last if it is there.
      drawn: a pattern of rows that the image shows, and the table then does not.
    """

    title: str
    how: str = "Measured on"
    rows: tuple[tuple[str, str], ...] = ()
    columns: tuple[tuple[str, str], ...] = ()
    targets: tuple[tuple[str, str, str, str], ...] = ()
    compared: tuple[tuple[str, str, str, tuple[str, ...]], ...] = ()
    variants: tuple[str, ...] = ()
    image: str = ""
    drawn: str = ""


_CATEGORIES = (
    ("single_object", "single object"),
    ("two_object", "two objects"),
    ("counting", "counting"),
    ("colors", "colors"),
    ("position", "position"),
    ("color_attribution", "color attribution"),
)


def _kernels() -> tuple[tuple[str, str, str, tuple[str, ...]], ...]:
    """What is compared of the ternary products, by Mosaic and by Triton."""
    many, few = "4608 tokens", "1 and 16 tokens"
    rows = (
        (f"W1.58A8 with quantising, over bf16, {many}", "2.0 x", "1.75 x", "a8_speedup"),
        (f"W1.58A8 alone, over XLA's int8, {many}", "1.05 x", "1.0 x", "a8_product_speedup"),
        (f"W1.58A16, over bf16, {many}", "1.05 x", "1.0 x", "a16_speedup"),
        (f"W1.58A8 with quantising, over bf16, {few}", "8 x", "4 x", "few_a8_speedup"),
        (f"W1.58A16, over bf16, {few}", "8 x", "4 x", "few_a16_speedup"),
        (f"W1.58A8, over gemlite's faster mode, {many}", "", "ahead", "over_gemlite_a8"),
        (f"W1.58A8, over gemlite's faster mode, {few}", "", "ahead", "few_over_gemlite_a8"),
        (
            "W1.58A8, over gemlite's faster mode, the worst shape",
            "",
            "ahead",
            "over_gemlite_a8_worst",
        ),
        (f"W1.58A16, over gemlite's A16W158, {many}", "", "ahead", "over_gemlite_a16"),
        (f"W1.58A16, over gemlite's A16W158, {few}", "", "ahead", "few_over_gemlite_a16"),
        (
            "W1.58A16, over gemlite's A16W158, the worst shape",
            "",
            "ahead",
            "over_gemlite_a16_worst",
        ),
        (
            f"W1.58A8 and u @ v.T, 64 columns, time over that without, {many}",
            "",
            "",
            "a8_product_branch",
        ),
        (f"W1.58A16 and u @ v.T, 64 columns, time over that without, {many}", "", "", "a16_branch"),
    )
    return tuple(
        (label, limit, reach, (name, f"triton_{name}")) for label, limit, reach, name in rows
    )


# A benchmark without a layout shows every figure under its own name.
LAYOUTS = {
    "transformer_step": Layout(
        title="FLUX.1-dev transformer, one step, 1024 x 1024, batch 1, bf16, random weights",
        rows=(
            ("step_ms", "time per step, steps queued"),
            ("step_ms/hoisted", "as the pipeline runs it: modulation computed before the loop"),
            ("waited_ms", "time per step, each waited for"),
            ("waited_ms/hoisted", "as the pipeline runs it"),
            ("floor_ms", "its products and attention, each timed alone"),
            ("peak_gib", "peak memory"),
            ("paper_total_gib", "weights and activations, computed"),
            ("compile_cold_s", "compilation, empty cache"),
            ("compile_warm_s", "compilation, filled cache"),
            ("first_step_s", "first step, compilation included"),
        ),
    ),
    "scaling_plan_gpu": Layout(
        title="distilling FLUX.1-dev, GiB a device",
        how="Planned for",
        columns=(
            ("held", "held between steps"),
            ("work", "gathered weights, gradients, activations"),
            ("peak", "in all"),
        ),
    ),
    "scaling_plan_cpu": Layout(
        title="distilling FLUX.1-dev, GiB a device",
        how="Planned for",
        columns=(
            ("held", "held between steps"),
            ("weights", "gathered weights, gradients"),
            ("activations", "activations, on paper"),
            ("peak", "in all"),
        ),
    ),
    **{
        name: Layout(
            title="attention",
            columns=(
                ("ms", "time"),
                ("tflops", "rate"),
                ("error", "off from float64"),
                ("psnr", "pictures against xla's"),
            ),
        )
        for name in ("attention", "attention_tiny")
    },
    "scaling_times": Layout(
        title="FLUX.1-dev, one step",
        how="Computed on",
        columns=(
            ("compute", "arithmetic"),
            ("exchange", "exchange"),
            ("sequential", "one after the other"),
            ("overlapped", "overlapped"),
            ("measured", "measured"),
            ("rate", "of all devices"),
            ("memory", "memory a device"),
        ),
    ),
    "scaling_distill": Layout(
        title="distilling FLUX.1-dev, one state a device",
        columns=(
            ("step", "step"),
            ("rate", "of all devices"),
            ("scaling", "over 2 devices"),
            ("utilisation", "utilisation"),
            ("peak", "peak memory a device"),
            ("first_loss", "loss at first"),
            ("last_loss", "at last"),
        ),
    ),
    "scaling_generate": Layout(
        title="FLUX.1-dev, 1024 x 1024, 28 steps",
        columns=(
            ("seconds", "time"),
            ("rate", "of all devices"),
            ("scaling", "over 1 device"),
            ("peak", "peak memory a device"),
        ),
    ),
    "lora": Layout(
        title="FLUX.1-dev, 1024 x 1024, one step",
        columns=(("step", "time"), ("times", "of that without"), ("weights", "weights")),
    ),
    "lora_adaptation": Layout(
        title="48 held-out prompts, 28 steps, the same noise",
        columns=(("psnr", "against the teacher with the LoRA"), ("light", "mean of all pixels")),
    ),
    "composition": Layout(
        title="composition score, 720 held-out prompts, guidance 3.5, 28 steps",
        rows=(
            ("overall", "overall, mean of the six"),
            *_CATEGORIES,
            ("held_out/pair", "prompts with a colour-shape pair never seen in training"),
            ("held_out/arrangement", "prompts with an arrangement never seen in training"),
        ),
    ),
    "student": Layout(
        title="720 held-out prompts, guidance 3.5, 28 steps, the teacher's noise",
        rows=(
            ("overall", "composition score, mean of the six categories"),
            ("kept", "kept of the teacher's score"),
            ("median_psnr", "image against the teacher's, median"),
            ("low_psnr", "the same, 10th percentile"),
            ("megabytes", "transformer on disk"),
            ("bits", "bits a parameter, all of the files counted"),
            *_CATEGORIES,
        ),
    ),
    "distillation": Layout(
        title="student",
        columns=(
            ("score", "composition score"),
            ("kept", "kept of the teacher's"),
            ("median_psnr", "median PSNR"),
            ("low_psnr", "10th percentile"),
            ("bits", "bits a parameter"),
            ("megabytes", "on disk"),
        ),
    ),
    "ternary_packing": Layout(
        title="all 304 ternary linears of FLUX.1-dev, in memory",
        rows=(
            ("ternary_weights", "weights"),
            ("quantize_s", "bf16 to scales and base-3 bytes"),
            ("quantize", "the same, of bf16 read"),
            ("pack", "codes to base-3 bytes, of the bf16 weights they stand for"),
            ("unpack", "base-3 bytes to codes, of codes written"),
            ("load_s", "base-3 bytes to the 2-bit layout"),
            ("load", "the same, of codes, were they a byte each"),
            ("load_packed", "the same, of 2-bit bytes written"),
            ("copy", "copying the bf16 weights"),
        ),
    ),
    "ternary_kernels": Layout(
        title="speed, geometric mean over FLUX.1-dev's shapes",
        compared=_kernels(),
        variants=("Mosaic", "Triton"),
    ),
    "ternary_fullsize": Layout(
        title="FLUX.1-dev's shapes, random weights, 1024 x 1024",
        rows=(
            ("source_gb", "bf16 weights"),
            ("stored_gb", "ternary, on disk"),
            ("ratio", "times smaller"),
            ("ternary_share", "share of the parameters that is ternary"),
            ("quantize_s", "`quantize`"),
            ("quantize_gb_per_s", "of bf16 input"),
            ("quantize_host_gb", "peak host memory"),
            ("calibrate_s", "`calibrate`, two blocks trained, all written"),
            ("calibrate_double_s", "training the double block"),
            ("calibrate_single_s", "training the single block"),
            ("calibrate_device_gib", "peak device memory"),
            ("calibrate_limit_gib", "of so much that there was"),
            ("calibrate_host_gb", "peak host memory"),
            ("load_s", "loading the ternary checkpoint"),
            ("weights_device_gib", "its weights on the device"),
            ("load_host_gb", "peak host memory"),
            ("step_ms", "one denoising step, plain JAX"),
            ("first_step_s", "the first, with compilation"),
            ("step_device_gib", "peak device memory"),
        ),
    ),
    "ternary_fullsize_cpu": Layout(
        title="FLUX.1-dev's shapes, random weights, on a CPU",
        rows=(
            ("source_gb", "bf16 weights"),
            ("stored_gb", "ternary, on disk"),
            ("ratio", "times smaller"),
            ("ternary_share", "share of the parameters that is ternary"),
            ("quantize_s", "`quantize`"),
            ("quantize_gb_per_s", "of bf16 input"),
            ("quantize_host_gb", "peak memory"),
            ("load_s", "loading the ternary checkpoint"),
            ("load_host_gb", "peak memory"),
            ("step_ms", "one denoising step of 256 x 256"),
            ("step_host_gb", "peak memory"),
        ),
    ),
    "full_size": Layout(
        title="FLUX.1-dev's shapes, random weights, 1024 x 1024, 28 steps, batch 1",
        targets=(
            ("ratio_disk", "transformer on disk, bf16 over ternary", "7.7 x", "9.3 x"),
            (
                "ratio_peak",
                "peak memory of the denoising loop, bf16 over ternary",
                "5.1 x",
                "6.5 x",
            ),
            ("over_eager", "one step, over diffusers bf16 eager", "1.13 x", "2.1 x"),
            ("over_compiled", "one step, over diffusers bf16 compiled", "", "1.6 x"),
            ("over_fp8", "one step, over diffusers fp8 row-wise compiled", "", "1.25 x"),
            ("over_floor", "one step, over its products and attention alone", "", "at most 1.2 x"),
            ("a16_over_compiled", "W1.58A16, over diffusers bf16 compiled", "", "1.05 x"),
            ("pipeline_peak_gib", "text to PNG, peak device memory", "24 GB card", "under 8 GiB"),
            ("card_bf16_runs_out", "24 GB budget: bf16 runs out of memory", "yes", "yes"),
            ("card_ternary_draws", "24 GB budget: the ternary pipeline draws", "yes", "yes"),
            ("first_image_s", "process start to first image, warm caches", "", "at most 20 s"),
        ),
        columns=(
            ("step_ms", "one step"),
            ("peak_gib", "peak memory"),
            ("planned_gib", "the same, planned by XLA"),
            ("draw_s", "a picture"),
        ),
        image="full_size.svg",
        drawn=r".+ pixels, batch \d+",
    ),
    "convert_fullsize": Layout(
        title="FLUX.1-dev transformer, diffusers folder to Flax checkpoint",
        rows=(
            ("size_gb", "size"),
            ("seconds", "time"),
            ("synced_seconds", "time until all of it is on the disk"),
            ("ratio", "time, of cp's"),
            ("peak_gb", "peak host memory"),
        ),
    ),
}
