"""Stubs of the package `colrow.v1`, generated from the protos at build time."""
