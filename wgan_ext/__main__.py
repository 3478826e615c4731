"""``python -m wgan_ext`` prints what was built, what was found and what will be used."""

from . import build_info

print(build_info())
