"""Rounds: a group of steps that a recipe repeats, and what a name means inside and outside of it.

Expert iteration and online preference training are such groups: sample from the policy, judge, train, and go on from
what came out. Every round's steps are steps of their own, with their own keys: one more round runs nothing again.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flows.recipe import LoadedRecipe, Recipe, Rounds, StepEntry
from steps.frame import Ref
from steps.frame.errors import did_you_mean

if TYPE_CHECKING:
    from flows.graph import Node


@dataclass(frozen=True)
class Occurrence:
    """A step of the recipe, once for each round where it stands in a group."""

    family: str
    """Name in the recipe."""
    entry: StepEntry
    place: tuple[str, ...]
    """Keys that lead to it in the recipe."""
    group: str = ""
    round: int = 0
    """1 is the first; 0 stands in no group."""


def occurrences(recipe: Recipe) -> Iterator[Occurrence]:
    """Yield all steps but the base, round after round, in the recipe's order."""
    for name, entry in recipe.steps.items():
        if isinstance(entry, StepEntry):
            yield Occurrence(name, entry, ("steps", name))
            continue
        for number in range(1, entry.rounds + 1):
            for inner, step in entry.steps.items():
                yield Occurrence(inner, step, ("steps", name, "steps", inner), name, number)


def titled(family: str, *parts: object) -> str:
    """Return a node's name.

    >>> titled("gguf", 2, "Q4_K_M"), titled("gguf", 0, "Q4_K_M"), titled("sft", 0, "")
    ('gguf[2,Q4_K_M]', 'gguf[Q4_K_M]', 'sft')
    """
    known = ",".join(str(part) for part in parts if part)
    return f"{family}[{known}]" if known else family


def round_of(name: str, node: "Node") -> int:
    """Return of which round a name is, if a node of a group has that name in some round; else 0."""
    number = name.removeprefix(f"{node.family}[").rstrip("]").partition(",")[0]
    is_alike = number.isdecimal() and titled(node.family, int(number), node.member) == name
    return int(number) if is_alike else 0


def called(nodes: Iterable["Node"], name: str) -> list["Node"]:
    """Return the nodes that a name means from outside their group, round after round.

    `gguf[2,Q4_K_M]` is one node; `gguf` and `gguf[Q4_K_M]` are those of all rounds; `gguf[2]` are those of one round.
    """
    known = list(nodes)
    for names in (
        lambda node: (node.name,),
        lambda node: (node.family, titled(node.family, node.member)),
        lambda node: (titled(node.family, node.round),),
    ):
        if found := [node for node in known if name in names(node)]:
            return found
    return []


def written(loaded: LoadedRecipe, node: "Node", inside: str = "") -> str:
    """Return how a reference names a node of the last round, or of its own: without the round, which may not last.

    Args:
        loaded: the recipe.
        node: what is meant.
        inside: group in which the reference stands.
    """
    group = loaded.recipe.steps.get(node.group)
    like_a_round = isinstance(group, Rounds) and node.member in map(str, range(1, group.rounds + 1))
    return node.name if like_a_round and node.group != inside else titled(node.family, node.member)


def known_names(loaded: LoadedRecipe, node: "Node", nodes: Iterable["Node"]) -> set[str]:
    """Return the names that a node's config may hold; those of its own group have no round."""
    group = loaded.recipe.steps.get(node.group)
    names = {*group.carry} if isinstance(group, Rounds) else set[str]()
    for each in nodes:
        if each.family != node.family:
            alike = each.group == node.group
            names |= {each.family, written(loaded, each, node.group) if alike else each.name}
    return names


def check_clear(loaded: LoadedRecipe, place: Sequence[str | int], nodes: Iterable["Node"], name: str) -> None:
    """Refuse a name that may mean a round of a step, or a member of its matrix.

    Raises:
        UserError: it may mean both.
    """
    known = [node for node in nodes if node.round and node.member]
    member = next((node for node in known if name == titled(node.family, node.member)), None)
    if member and (other := next((node for node in known if name == titled(node.family, node.round)), None)):
        both = f"`{member.family}[ROUND,{member.member}]` or `{other.family}[{other.round},MEMBER]`"
        raise loaded.error(
            place,
            f"`{name}` may mean the member {member.member} of every round, or round {other.round}; write {both}",
        )


def check_round(loaded: LoadedRecipe, place: Sequence[str], group: str, ref: Ref, nodes: Iterable["Node"]) -> None:
    """Refuse a reference that takes a step of its own group from one and the same round, in whichever round it stands.

    Raises:
        UserError: it does; the sentence says what means the same round's step.
    """
    pinned = [node for node in called(nodes, ref.step) if node.group == group]
    if pinned:
        name = titled(pinned[0].family, pinned[0].member if ref.step == pinned[0].name else "")
        raise loaded.error(
            place,
            f"`{ref.step}` is of one round of `{group}` for ever; write `{Ref(name, ref.output)}`, without its number "
            "(what the round before made comes by `carry:`)",
        )


def latest(nodes: Sequence["Node"]) -> list["Node"]:
    """Keep those of the last round: what a bare name means where one artifact is asked for."""
    last = max((node.round for node in nodes), default=0)
    return [node for node in nodes if node.round == last]


def meant(rounds: Rounds, spot: tuple[str, int], ref: Ref, nodes: Collection["Node"]) -> tuple[list["Node"], str]:
    """Return the nodes that a reference means inside a group, and the output.

    Args:
        rounds: the group.
        spot: the group's name, and the round in which the reference stands, from 1.
        ref: as the recipe has it: a step of the same round, a carried name, or a name from outside.
        nodes: all nodes.
    """
    group, number = spot
    if ref.step in rounds.carry:
        start, then = Ref.parse(rounds.carry[ref.step].start), Ref.parse(rounds.carry[ref.step].then)
        before = (group, number - 1)
        found, output = (
            (latest(called(nodes, start.step)), start.output) if number == 1 else meant(rounds, before, then, nodes)
        )
        return found, ".".join(filter(None, (output, ref.output)))
    return same_round(spot, ref.step, nodes) or called(nodes, ref.step), ref.output


def same_round(spot: tuple[str, int], name: str, nodes: Iterable["Node"]) -> list["Node"]:
    """Return the nodes of a group's round, given as in `meant`, that a name means in it: `tuned`, `tuned[MEMBER]`."""
    family, _, member = name.removesuffix("]").partition("[")
    alike = [node for node in nodes if (node.group, node.round, node.family) == (*spot, family)]
    return [node for node in alike if not member or node.member == member]


def picked(
    loaded: LoadedRecipe,
    place: Sequence[str],
    ref: Ref,
    found: Sequence["Node"],
    known: Collection[str],
    *,
    many: bool,
    inside: str = "",
) -> list[Ref]:
    """Return the outputs that a reference means.

    Args:
        loaded: the recipe.
        place: the key that holds the reference.
        ref: the reference as written.
        found: the nodes that its name means.
        known: names that could have been meant.
        many: whether the key takes several.
        inside: group in which the reference stands.

    Raises:
        UserError: there is no such step or output, or its settings leave that out, or there are several where one is
            asked for.
    """
    if not found:
        raise loaded.error(place, f"there is no step `{ref.step}`{did_you_mean(ref.step, known)}")
    if len(found) > 1 and not many:
        choice = " or ".join(f"`{written(loaded, each, inside)}`" for each in found)
        raise loaded.error(place, f"`{ref.step}` is a matrix of {len(found)} steps; name one: {choice}")
    for node in found:
        if why := node.config.not_given.get(ref.output):
            raise loaded.error(place, f"`{ref}` is not made: in `{node.name}` {why}")
        if ref.output not in node.outputs:
            outputs = [str(Ref(ref.step, output)) for output in node.outputs]
            raise loaded.error(place, f"`{ref}` does not exist{did_you_mean(str(ref), outputs)}")
    return [Ref(node.name, ref.output) for node in found]


def check_names(loaded: LoadedRecipe) -> None:
    """Refuse a name that means two things.

    Raises:
        UserError: two steps, groups or carried names are called the same.
    """
    seen: dict[str, str] = {}
    for name, entry in loaded.recipe.steps.items():
        places = [("steps", name)]
        if isinstance(entry, Rounds):
            places += [("steps", name, key, inner) for key in ("carry", "steps") for inner in getattr(entry, key)]
        for place in places:
            if place[-1] in seen:
                raise loaded.error(place, f"the name `{place[-1]}` is taken by {seen[place[-1]]}; give this another")
            seen[place[-1]] = ".".join(place)


def check_carried(loaded: LoadedRecipe, nodes: Mapping[str, "Node"], *, kinds: bool) -> None:
    """Refuse carried names that lead nowhere, or (once `kinds` are known) change their kind from round to round.

    Raises:
        UserError: `start` is no step outside the group, `then` is none in it, or they give different kinds.
    """
    for group, rounds in loaded.recipe.steps.items():
        if not isinstance(rounds, Rounds):
            continue
        outside = [node for node in nodes.values() if node.group != group]
        inside = [node for node in nodes.values() if node.group == group and node.round == 1]
        for name, carried in rounds.carry.items():
            place = ("steps", group, "carry", name)
            start, then = Ref.parse(carried.start), Ref.parse(carried.then)
            if start.step.partition("[")[0] in (*rounds.steps, *rounds.carry):
                message = f"`{start.step}` is of the group; name what is there before its first round"
                raise loaded.error((*place, "start"), message)
            if then.step.partition("[")[0] not in rounds.steps:
                message = f"`{then.step}` is no step of `{group}`{did_you_mean(then.step, rounds.steps)}"
                raise loaded.error((*place, "then"), message)
            if not (later_nodes := same_round((group, 1), then.step, inside)):
                check_round(loaded, (*place, "then"), group, then, nodes.values())
            known = {node.family for node in outside}
            there = latest(called(outside, start.step))
            (first,) = picked(loaded, (*place, "start"), start, there, known, many=False)
            spot = (*place, "then")
            (later,) = picked(loaded, spot, then, later_nodes, rounds.steps, many=False, inside=group)
            before, after = (nodes[ref.step].outputs[ref.output] for ref in (first, later))
            if kinds and before != after:
                message = f"every round needs the same kind: `{start}` gives {before.named()}, `{then}` {after.named()}"
                raise loaded.error(place, message)
