from dataclasses import dataclass

import torch

import moepatch
from moepatch.registry import compute


@dataclass(frozen=True)
class SquareSpec:
    width: int

    def describe(self):
        return f"{self.width} wide"

    def to_dict(self):
        return {"width": self.width}


class PatchedSquare(moepatch.Patched):
    def forward(self, x):
        spec, backend = self._moepatch
        return compute("square", backend)(x, self.weight)


def inject(spec, backend, implementation):
    return {"": (PatchedSquare, (spec, backend))}


def trial(spec, dtype, device, generator):
    return moepatch.Call((torch.randn(5, spec.width, generator=generator).to(device, dtype),))


moepatch.register_kind(moepatch.Kind(name="square", pattern="square", backends="square", injections=inject, trial=trial, dense=True))


@moepatch.register_backend("square", "reference", rank=0, serves="plain torch")
def reference():
    return lambda x, weight: (x * weight).square()


@moepatch.register_matcher("square")
def match(found, scan, memo):
    module = found.module
    if type(module).__name__ != "Square":
        return None
    spec, dtype = SquareSpec(len(module.weight)), str(module.weight.dtype).removeprefix("torch.")
    where = {"fqns": found.fqns, "class_name": "Square", "device": str(module.weight.device)}
    return moepatch.Site(kind="square", spec=spec, now="its own forward", dtype=dtype, **where)
