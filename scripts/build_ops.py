"""Compiles the operator that DeepSpeed needs on CPUs, once, so that no run has to wait for it."""

from posttrain.engine.launch import build_operators

build_operators()
