"""`python -m moe_compress` is `moe-compress`."""

from moe_compress.cli import app

app(prog_name="moe-compress")
