"""How stored bytes become pixels.

A format module names the steps (`gpuem.formats.source.Step`); this package knows how each is undone on the host.
Frame codecs unpack whole frames (`merlin`), chunk codecs are chains of filters (`chunks`).
"""
