"""From a manifest to the rules that a zeroth-order run's signatures and records stand under."""

from __future__ import annotations

from peer.finetune.seed_rules import SeedRules
from peer.manifest import Manifest


def rules_of(manifest: Manifest, base: bytes) -> SeedRules:
    """`base`: the digest of the values that the run starts from (`Weights.digest`)."""
    spec, kseed = manifest.zeroth, manifest.zeroth.estimator == "kseed"
    return SeedRules(
        run=bytes.fromhex(manifest.run_id()),
        base=base,
        seed=manifest.model.seed,
        method=spec.estimator,
        lr=manifest.inner.lr,
        eps=spec.eps,
        noise=spec.noise,
        master=spec.master,
        form=spec.form,
        perturbations=1 if kseed else spec.perturbations,
        steps=1 if kseed else spec.steps,
        pool=spec.pool if kseed else 0,
        reduction=spec.reduction,
        trim_percent=spec.trim_percent,
        weight_max=spec.weight_max,
    )
