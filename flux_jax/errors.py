"""Errors a user can mend; their home is the package that imports nothing of ours."""

from pallas_kernels.errors import UserError as UserError
from pallas_kernels.errors import exit_on_user_error as exit_on_user_error
