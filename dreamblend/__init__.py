"""Personalised text-to-image diffusion that keeps both the prompt and the subject."""

from dreamblend.renamed import install as _install

_install()
