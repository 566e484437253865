"""Two methods in one prefill: A+B, where A acts before the language model and B in it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Composition:
    """A `Method` with the stage `pick` or `merge`, then one with `keep` or `narrow`. It is used like a Method."""

    first: object
    second: object

    @property
    def parts(self):
        """Both Methods."""
        return self.first, self.second

    @property
    def name(self):
        """ "A+B"."""
        return "+".join(part.name for part in self.parts)

    @property
    def settings(self):
        """The settings of both, {"A.retention": 0.5, ...}."""
        return {f"{part.name}.{key}": value for part in self.parts for key, value in part.settings.items()}

    @property
    def effective(self):
        """The settings that have an effect, as in `settings`."""
        return {f"{part.name}.{key}": value for part in self.parts for key, value in part.effective.items()}

    @property
    def spec(self):
        """The SPEC with every effective setting."""
        return "+".join(part.spec for part in self.parts)

    @property
    def looks_ahead(self):
        """As in `Method`: only the second part uses look-ahead rows."""
        return self.second.looks_ahead

    @property
    def picks(self):
        """True: the language model gets fewer or other vision tokens."""
        return True

    @property
    def narrows(self):
        """True: the first new token may differ."""
        return True

    @property
    def attends(self):
        """As in `Method`."""
        return self.second.attends

    @property
    def compacts(self):
        """As in `Method`."""
        return self.second.compacts

    @property
    def evicts(self):
        """As in `Method`."""
        return self.second.evicts

    @property
    def newest(self):
        """As in `Method`."""
        return self.second.newest

    @property
    def extra_tokens(self):
        """As in `Method`."""
        return self.second.extra_tokens

    @property
    def moves(self):
        """As in `Method`."""
        return self.first.moves

    @property
    def needs_cls(self):
        """As in `Method`."""
        return self.first.needs_cls

    @property
    def merge_after(self):
        """As in `Method`."""
        return self.first.merge_after

    def check(self, num_layers, kv_heads):
        """ValueError if a part does not fit the model."""
        for part in self.parts:
            part.check(num_layers, kv_heads)

    @property
    def fraction(self):
        """As in `Method`: that of both together."""
        return _product([part.fraction for part in self.parts])

    def requested(self, tokens, parts=None):
        """As in `Method`: of the vision tokens, and of those that the first part leaves."""
        first = self.first.wanted(tokens)
        left = ([max(1, round(n * (first or 1))) for n in counts] for counts in (tokens, parts or tokens))
        return [first, self.second.wanted(*left)]

    def wanted(self, tokens, parts=None):
        """As in `Method`: that of both together."""
        return _product(self.requested(tokens, parts))

    def shares(self, picked, kept):
        """As in `Method`."""
        return [picked, kept / picked]

    def layers(self, num_layers):
        return self.first.layers(num_layers)

    def merge(self, patches):
        return self.first.merge(patches)

    def pick(self, picture):
        return self.first.pick(picture)

    def protect(self, picture):
        return self.first.protect(picture)

    def keep(self, view):
        return self.second.keep(view)

    def narrow(self, view):
        return self.second.narrow(view)

    def attend(self, view):
        return self.second.attend(view)

    def evict(self, view):
        return self.second.evict(view)

    def guarded(self, view):
        return self.second.guarded(view)

    def compact(self, prefilled):
        return self.second.compact(prefilled)


def _product(fractions):
    """The product, or None if one is None."""
    return None if None in fractions else fractions[0] * fractions[1]
