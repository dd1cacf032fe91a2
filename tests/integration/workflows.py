"""Workflows of Celery's canvas, and what is compared of them: results, states, and the bodies that ran."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from celery import chain, chord, group
from celery.result import GroupResult, result_from_tuple

from tests.integration.workshop import Workshop

Tasks = SimpleNamespace
Workflow = Callable[[Tasks], Any]


def a_chain(t: Tasks) -> Any:
    return chain(t.add.s(1, 2), t.add.s(3), t.add.s(4)).apply_async()


def a_chain_with_an_immutable_step(t: Tasks) -> Any:
    return chain(t.add.s(1, 2), t.add.si(5, 5), t.add.s(1)).apply_async()


def a_chain_that_breaks(t: Tasks) -> Any:
    return chain(t.add.s(1, 2), t.broken.s(), t.add.s(4)).apply_async(link_error=t.mourn.s(label="chain"))


def a_chain_with_a_retry(t: Tasks) -> Any:
    return chain(t.flaky.s(1), t.flaky.s(2), t.add.s(3)).apply_async()


def a_chain_with_a_retry_in_vain(t: Tasks) -> Any:
    return chain(t.flaky.s(1, failures=9), t.add.s(3)).apply_async(link_error=t.mourn.s(label="vain"))


def a_chain_with_a_delay(t: Tasks) -> Any:
    return chain(t.add.s(1, 2), t.add.s(3).set(countdown=0.5), t.add.s(4)).apply_async()


def a_group(t: Tasks) -> Any:
    return group(t.add.s(n, n) for n in range(4)).apply_async()


def a_group_with_a_failure(t: Tasks) -> Any:
    return group(t.add.s(1, 1), t.broken.s(), t.flaky.s(7)).apply_async()


def a_chord(t: Tasks) -> Any:
    return chord([t.add.s(n, n) for n in range(4)])(t.total.s())


def a_chord_with_retries_and_delays(t: Tasks) -> Any:
    return chord([t.flaky.s(1), t.add.s(2, 2).set(countdown=0.5), t.flaky.s(3, failures=2)])(t.total.s())


def a_chord_with_a_failure(t: Tasks) -> Any:
    body = t.total.s().on_error(t.mourn.s(label="chord"))
    return chord([t.add.s(1, 1), t.broken.s()])(body)


def a_chord_with_a_member_that_has_its_own_errback(t: Tasks) -> Any:
    return chord([t.add.s(1, 1), t.broken.s().on_error(t.mourn.s(label="member"))])(t.total.s())


def a_chord_in_a_chain(t: Tasks) -> Any:
    return chain(t.add.s(1, 1), group(t.add.s(1), t.add.s(2)), t.total.s(), t.add.s(5)).apply_async()


def chains_in_a_chord(t: Tasks) -> Any:
    return chord([chain(t.add.s(1, 2), t.add.s(3)), t.add.s(1, 1)])(t.total.s())


def a_chord_in_a_chord(t: Tasks) -> Any:
    inner = chord([t.add.s(1, 1), t.add.s(2, 2)], t.total.s())
    return chord([inner, t.add.s(3, 3)])(t.total.s())


def a_link(t: Tasks) -> Any:
    return t.add.apply_async((1, 2), link=[t.add.s(10), t.add.si(7, 7)])


def a_link_of_a_link(t: Tasks) -> Any:
    linked = t.add.s(10)
    linked.link(t.add.s(100))
    return t.add.apply_async((1, 2), link=linked)


def an_errback(t: Tasks) -> Any:
    return t.broken.apply_async(link=t.add.s(1), link_error=t.mourn.s(label="errback"))


def a_map(t: Tasks) -> Any:
    return t.total.map([[1, 2], [3], []]).apply_async()


def a_starmap(t: Tasks) -> Any:
    return t.add.starmap([(1, 2), (3, 4)]).apply_async()


def some_chunks(t: Tasks) -> Any:
    return t.add.chunks([(n, n) for n in range(5)], 2).group().apply_async()


def a_replacement_by_a_task(t: Tasks) -> Any:
    return t.delegate.delay(1, "task")


def a_replacement_by_a_chain(t: Tasks) -> Any:
    return t.delegate.delay(2, "chain")


def a_replacement_by_a_chord(t: Tasks) -> Any:
    return t.delegate.delay(3, "chord")


def a_replacement_by_a_group(t: Tasks) -> Any:
    return t.delegate.delay(4, "group")


def a_replacement_by_itself(t: Tasks) -> Any:
    return t.countdown.delay(3)


def a_replacement_in_a_chain(t: Tasks) -> Any:
    return chain(t.add.s(1, 1), t.delegate.s("task"), t.delegate.s("chord"), t.add.s(1)).apply_async()


def a_replacement_in_a_chord(t: Tasks) -> Any:
    return chord([t.delegate.s(1, "chain"), t.countdown.s(2), t.add.s(1, 1)])(t.total.s())


def a_chain_of_groups(t: Tasks) -> Any:
    first, second = group(t.add.s(1, n) for n in range(2)), group(t.total.s(), t.total.s())
    return chain(first, second, t.total.s()).apply_async()


def a_group_of_chains(t: Tasks) -> Any:
    return group(chain(t.add.s(n, 1), t.add.s(10), t.flaky.s()) for n in range(2)).apply_async()


def a_chord_whose_body_is_a_chain(t: Tasks) -> Any:
    return chord([t.add.s(n, n) for n in range(2)])(chain(t.total.s(), t.add.s(100)))


def a_chord_whose_body_is_a_chord(t: Tasks) -> Any:
    inner = chord([t.add.s(1), t.add.s(2)], t.total.s())
    return chord([t.add.s(1, 1), t.add.s(2, 2)])(chain(t.total.s(), inner))


def a_chord_of_one(t: Tasks) -> Any:
    return chord([t.add.s(1, 1)])(t.total.s())


def a_chord_of_chains_that_break(t: Tasks) -> Any:
    body = t.total.s().on_error(t.mourn.s(label="deep"))
    return chord([chain(t.add.s(1, 1), t.broken.s()), t.add.s(1, 1)])(body)


def a_replacement_with_links(t: Tasks) -> Any:
    return t.delegate.apply_async((5, "chain"), link=t.add.s(7), link_error=t.mourn.s(label="replaced"))


WORKFLOWS: list[Workflow] = [
    a_chain,
    a_chain_with_an_immutable_step,
    a_chain_that_breaks,
    a_chain_with_a_retry,
    a_chain_with_a_retry_in_vain,
    a_chain_with_a_delay,
    a_group,
    a_group_with_a_failure,
    a_chord,
    a_chord_with_retries_and_delays,
    a_chord_with_a_failure,
    a_chord_with_a_member_that_has_its_own_errback,
    a_chord_in_a_chain,
    chains_in_a_chord,
    a_chord_in_a_chord,
    a_link,
    a_link_of_a_link,
    an_errback,
    a_map,
    a_starmap,
    some_chunks,
    a_replacement_by_a_task,
    a_replacement_by_a_chain,
    a_replacement_by_a_chord,
    a_replacement_by_a_group,
    a_replacement_by_itself,
    a_replacement_in_a_chain,
    a_replacement_in_a_chord,
    a_chain_of_groups,
    a_group_of_chains,
    a_chord_whose_body_is_a_chain,
    a_chord_whose_body_is_a_chord,
    a_chord_of_one,
    a_chord_of_chains_that_break,
    a_replacement_with_links,
]


def portrait(result: Any) -> Any:
    """A workflow's results and states, parents and children included, without the ids."""
    if result is None:
        return None
    if isinstance(result, GroupResult):
        return {"group": [portrait(each) for each in result.results], "parent": portrait(result.parent)}
    meta = result.backend.get_task_meta(result.id, cache=False)
    children = [portrait(result_from_tuple(child, result.app)) for child in meta.get("children") or ()]
    return {
        "state": meta["status"],
        "result": re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "<id>", repr(meta["result"])),
        "children": sorted(children, key=repr),
        "parent": portrait(result.parent),
    }


def roots(result: Any) -> set[str]:
    """The ids of all that the producer of a workflow sent: whatever runs in it, an errback's too, follows from one."""
    if result is None:
        return set()
    members = result.results if isinstance(result, GroupResult) else ()
    return {result.id, *roots(result.parent)}.union(*map(roots, members))


def bodies(workshop: Workshop, result: Any) -> list[Any]:
    """The bodies that ran in this workflow, without their kind, ids and order."""
    own = roots(result)
    ran = [note[2:] for note in workshop.app.notes.all() if note[0] == "ran" and note[-1] in own]
    return sorted([name.partition(".")[2], *rest] for name, *rest, _ in ran)


def compare(workshop: Workshop, workflow: Workflow, kind: str, *, bodies_too: bool = True) -> None:
    """Put the workflow through plain tasks and through *kind*: the outcome is the same, and the bodies that ran."""
    plain, other = workflow(workshop.plain), workflow(getattr(workshop, kind))
    wait_over(workshop, plain)
    assert_same(workshop, plain, ended(workshop, other))
    if bodies_too:
        assert_same_bodies(workshop, plain, other)
        workshop.compared.append((plain, other))


def ended(workshop: Workshop, result: Any) -> Any:
    """Wait for the end of a workflow. Returns its result."""
    workshop.wait_ready(result)
    return result


def wait_over(workshop: Workshop, plain: Any) -> Any:
    """Wait until nothing of a workflow of plain tasks is under way: its results and bodies are final. Returns it.

    Its end is not enough: errbacks and links come after the result they follow.
    """
    own = roots(plain)

    def over() -> bool:
        notes = workshop.app.notes.all()  # once: between two looks a run may send its links and be over
        sent, done = (
            Counter(id for what, id, *rest in notes if what == kind and rest[-1] in own) for kind in ("sent", "over")
        )
        return bool(sent) and sent <= done

    workshop.wait(over, f"{plain!r} over")
    return ended(workshop, plain)


def assert_same(workshop: Workshop, plain: Any, other: Any) -> None:
    """All results and states become those of the workflow that is over; nothing is under way after that."""
    wanted = portrait(plain)
    with suppress(AssertionError):
        workshop.wait(lambda: portrait(other) == wanted, "the same outcome")
    workshop.wait_settled()
    became = portrait(other)
    assert became == wanted, f"wanted {wanted}\nbecame {became}"


def assert_same_bodies(workshop: Workshop, plain: Any, other: Any) -> None:
    """The bodies that ran become those of the plain workflow. What a result does not wait for may come later."""
    wanted = bodies(workshop, plain)
    assert wanted, "a workflow in which nothing runs proves nothing"
    with suppress(AssertionError):
        workshop.wait(lambda: bodies(workshop, other) == wanted, "bodies")
    ran = bodies(workshop, other)
    assert ran == wanted, f"wanted {wanted}\n  ran {ran}"


def assert_still(workshop: Workshop) -> None:
    """When no message is left, nothing has run in a workflow that was compared but what had run then."""
    workshop.wait_idle()
    for plain, other in workshop.compared:
        wanted, ran = bodies(workshop, plain), bodies(workshop, other)
        assert ran == wanted, f"later than its end: wanted {wanted}\n  ran {ran}"
