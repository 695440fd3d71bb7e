"""Parameters chosen by patterns of their names: which are trained, which decay, and how fast."""

import difflib
import fnmatch
from collections.abc import Collection, Iterable

from jaxsd.errors import JaxsdError
from jaxsd.nn import Params
from jaxsd.training.options import Options


def chosen(patterns: Iterable[str], names: Collection[str], option: str) -> set[str]:
    """The names that fit at least one pattern; JaxsdError for a pattern that none fits.

    Patterns are those of a shell (`*`, `?`, `[abc]`) and fit a whole name; `*` takes dots too.
    """
    found: set[str] = set()
    for pattern in patterns:
        fitting = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        if not fitting:
            near = difflib.get_close_matches(pattern, names, 3, cutoff=0.0)
            raise JaxsdError(f"{option}: no parameter is called {pattern!r}; near is {near}")
        found |= fitting
    return found


def split_params(params: Params, options: Options) -> tuple[Params, Params]:
    """(trained, frozen) by `options.train` and `options.freeze`, the latter having the last word.

    JaxsdError if a pattern of any option fits nothing, or if nothing is left to train.
    """
    names = chosen(options.train, params, "train") if options.train else set(params)
    names -= chosen(options.freeze, params, "freeze")
    if not names:
        raise JaxsdError("train and freeze leave no parameter to train")
    trained = {name: value for name, value in params.items() if name in names}
    for check in (decays, rate_factors):  # refused now, not in the first step
        check(options, trained)
    return trained, {name: value for name, value in params.items() if name not in names}


def decays(options: Options, params: Params) -> dict[str, bool]:
    """Whether each parameter decays: by default matrices and kernels, not biases and scales."""
    if not options.decayed:
        return {name: value.ndim > 1 for name, value in params.items()}
    names = chosen(options.decayed, params, "decayed")
    return {name: name in names for name in params}


def rate_factors(options: Options, params: Params) -> dict[str, float]:
    """By what each parameter's learning rate differs from the common one."""
    factors = dict.fromkeys(params, 1.0)
    for given in options.rate_factors:
        pattern, _, number = given.rpartition("=")
        try:
            factor = float(number)
        except ValueError:
            factor = -1.0
        if not pattern or not 0 <= factor < float("inf"):
            raise JaxsdError(f"rate_factors are PATTERN=FACTOR, such as *.attn2.*=0.5, not {given}")
        factors |= dict.fromkeys(chosen([pattern], params, "rate_factors"), factor)
    return factors
