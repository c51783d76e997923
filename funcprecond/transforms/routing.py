"""The usual routing of parameters between a method for hidden matrices and one for the others."""

from fnmatch import fnmatchcase

from torch import Tensor

from funcprecond.linalg.axes import axes_of
from funcprecond.transforms.partition import Rule

__all__ = ["muon_rules"]

# Names of the first and last layers of a model, compared with every part of a dotted name.
ENDS = (
    *("embed*", "*_embed", "*embedding", "*embeddings", "tok_emb", "pos_emb", "wte", "wpe"),
    *("head", "heads", "*_head", "classifier", "logits", "fc"),
)


def muon_rules(*others: str) -> list[Rule]:
    """The usual rules for :func:`funcprecond.partition` with the methods ``muon=`` and ``adam=``.

    Hidden matrices and convolutions go to Muon. Vectors go to Adam, and so do parameters whose name
    says that they are an embedding or a head (``wte``, ``lm_head``, ``classifier``, ...), and those
    named by the caller.

    Args:
        *others: patterns of more names for Adam, such as ``"4.*"`` for a last layer whose name does
            not say so. Print ``fp.assign(rules, params)`` to see that none is missing.

    Returns:
        A list of rules for :func:`funcprecond.partition`.

    Example:
        >>> import torch, funcprecond as fp
        >>> params = {"wte": torch.zeros(9, 4), "mlp.weight": torch.zeros(4, 4)}
        >>> fp.assign(fp.muon_rules(), params).labels
        {'wte': 'adam', 'mlp.weight': 'muon'}
    """

    def is_end(name: str, p: Tensor) -> bool:
        return any(fnmatchcase(part, x) for part in name.split(".") for x in ENDS)

    def is_matrix(name: str, p: Tensor) -> bool:
        return bool(axes_of(p.shape))

    named: list[Rule] = [(pattern, "adam") for pattern in others]
    return [*named, (is_end, "adam"), (is_matrix, "muon"), ("*", "adam")]
