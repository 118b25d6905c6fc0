"""Products with packed ternary weights: the public op, its layout, and its plain-JAX reference."""

from pallas_kernels.api import BACKENDS as BACKENDS
from pallas_kernels.api import quantize_activations as quantize_activations
from pallas_kernels.api import ternary_matmul as ternary_matmul
from pallas_kernels.packing import BLOCK_BYTES as BLOCK_BYTES
from pallas_kernels.packing import BLOCK_CODES as BLOCK_CODES
from pallas_kernels.packing import GROUP as GROUP
from pallas_kernels.packing import group_count as group_count
from pallas_kernels.packing import pack_codes as pack_codes
from pallas_kernels.packing import packed_width as packed_width
from pallas_kernels.packing import unpack_codes as unpack_codes
