"""Proofs of native runtimes, one module each; see `steps.runtime.proof`."""
