"""The only face of KV memory that the scheduler sees: match, reserve, commit, behind, release, check.

A model's layers fall into *groups* whose memory lives alike (`core.memory`): one that keeps every token, one for each
window, one of states. Each has page ids (or slots of state) and a free list of its own; a radix tree over whole pages
of tokens says what is cached, and a page of the tree may be there in some groups and lost in others.

Who owns which pages, when
--------------------------
In each group every page except page 0 (scratch of the pool) is at each moment in exactly one of three places:

* **free**: on the group's stack. Its content means nothing.
* **in the tree**: in one node of the radix tree, computed, whole, and never written again.
* **held**: by exactly one running request, which alone reads and writes it.

A running request's `Lease` has a table row for each group, its pages in order of position. `table[:shared]` are pages
in the tree, `table[shared:held]` are its own. What keeps pages in the tree from being evicted differs:

* The group that keeps everything: the lock on `lease.node` protects all pages up to there.
* Groups with a window: a lease locks page by page what it may still read, from `lease.first` on. Before `first` the
  table has 0: own pages there are free again, those of the tree can be evicted there although their node is locked.
* States: the row is [slot to read, slot to write]. A lease has two slots of its own, written in turn, so that a step
  never overwrites what it has read and can be undone. A slot in the tree is a snapshot of the state at a node's end;
  whoever reads it has it locked, and writes into a slot of its own: nothing is ever copied. A step that ends at a page
  border leaves the state there in a third slot until the next border, for the tree: a conversation goes on from it.

    admission   match    locks a path up to a border that every group can give: pages to    free  ->  -
                         there, of windows those that are read from there, and a state
    each step   reserve  takes free pages of every group (evicting unlocked ones first),    free  ->  held
                         at first two slots of state; all groups or nothing
    at launch   turn     what the step writes is what the next one reads; at a page border  held  ->  held
                         another slot to write, so that the state there stays, if possible  free  ->  held
                commit   gives whole pages whose tokens are known to the tree, keeps them   held  ->  in tree
                         locked; where the tree has an equal page the own copy is freed,    held  ->  free
                         where it has lost the page it gets it back; a state that was kept
                         at this border becomes the node's                                  held  ->  in tree
    at commit   behind   what no later token reads: own pages of windows are freed,         held  ->  free
    of a step            those of the tree, and snapshots read before, are unlocked
    at the end  release  commits what is known and computed, unlocks, frees the rest        held  ->  free
    eviction    reserve  pages of unlocked leaves, with all that hangs on them; unlocked    tree  ->  free
                         pages of windows; unlocked snapshots
    a step that did not happen (no memory for it)
                roll_back  takes back what entered the tree since its launch                tree  ->  held or free

The runner executes steps in launch order, as a device stream does. Therefore pages change owner on the *launch* of
their last user, not on its end: a later launch that writes them runs after every earlier one that reads them; and a
page that a launched step will fill may be matched by the next plan already. Only `behind` waits for the end of a step:
what a request can no longer read it could still need if the step had to be undone.

Somebody who copies pages outside of that order holds them (`hold`, `drop`).

`free + in tree + held == total` holds in each group between any two calls; `check` verifies it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from phloem.kvcache.allocator import PageAllocator
from phloem.kvcache.lease import NO_BORDER, SLOTS, Given, Hold, Lease, Turn
from phloem.kvcache.namespaces import namespace
from phloem.kvcache.node import NO_PAGES, Node, ends_between, path_to
from phloem.kvcache.radix import Found, RadixCache
from phloem.kvcache.snapshots import Snapshots
from phloem.kvcache.windows import WindowPages

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from phloem.core.memory import Group
    from phloem.kvcache.radix import Listener

__all__ = ["CacheManager", "Found", "Given", "Hold", "Lease", "namespace"]

STATE_INTERVAL = 2048  # tokens of a long prompt between two snapshots


class CacheManager:
    """Pages of `page_size` tokens in each group, shared through a radix tree unless `enabled` is False.

    Args:
        groups: from `core.memory.groups_of`.
        num_pages: of each group, the scratch page (or slot) 0 included.
        page_size: tokens of a page.
        enabled: whether computed prefixes are kept for others.
        eviction: which unlocked leaf goes first: lru, lfu, fifo.
        state_interval: tokens between two snapshots of states within a long prompt; rounded to whole pages.
        chunk: most tokens of a step, where known: bounds what a request holds in a group with a window.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        num_pages: Sequence[int],
        page_size: int,
        enabled: bool = True,
        eviction: str = "lru",
        *,
        state_interval: int = STATE_INTERVAL,
        chunk: int = 0,
    ) -> None:
        if not groups or len(groups) != len(num_pages):
            raise ValueError(f"{len(groups)} groups of memory, but pages for {len(num_pages)}")
        self.groups = tuple(groups)
        self.page_size = page_size
        self.enabled = enabled
        self.allocators = tuple(PageAllocator(count) for count in num_pages)
        self.paged = sum(group.kind == "pages" for group in groups)  # so many come first, then states, if any
        whole = self.paged > 0 and not groups[0].window
        self.windows = tuple(
            WindowPages(index, number, groups[number].window, num_pages[number], page_size)
            for index, number in enumerate(range(int(whole), self.paged))
        )
        self.states = Snapshots(self.paged, num_pages[self.paged]) if self.paged < len(groups) else None
        self.tree = RadixCache(page_size, eviction, self.windows, self.states, whole)
        self._plain = self.tree.plain
        self.gives_back = bool(self.windows) or self.states is not None  # whether `behind` has anything to do
        self.has_states = self.states is not None  # whether `turn` and `cut` have anything to do
        self.evicted = [0] * len(groups)
        self.own = [0] * len(groups)  # pages held by requests, of each group
        self.holds: list[Hold] = []
        self.number = 0  # among several
        self.parts: tuple[CacheManager, ...] = (self,)
        self._chunk = chunk
        self._interval = max(1, state_interval // page_size) * page_size

    # what there is; pages of the first group

    @property
    def total_pages(self) -> int:
        return self.allocators[0].usable

    @property
    def most_pages(self) -> int:
        """Those that one request can have."""
        return self.total_pages

    @property
    def free_pages(self) -> int:
        return self.allocators[0].available

    @property
    def held_pages(self) -> int:
        return self.own[0]

    @property
    def evicted_pages(self) -> int:
        return self.evicted[0]

    @property
    def available_pages(self) -> int:
        """What `reserve` can get at most of the first group: free pages and those that eviction would free."""
        return self.allocators[0].available + self.evictable(0)

    def pages_for(self, tokens: int) -> int:
        """Most pages of the first group that a request of so many tokens holds at once."""
        group = self.groups[0]
        if group.kind == "state":
            return SLOTS
        pages = -(-tokens // self.page_size)
        if not group.window or not self._chunk:
            return pages
        return min(pages, -(-(group.window + 2 * self._chunk) // self.page_size) + 2)

    @property
    def version(self) -> int:
        """Changes whenever a `probe` may give another answer."""
        return self.tree.version

    @property
    def on_evict(self) -> Listener | None:
        """Hears (group, [(hash of all tokens up to the page's end, page)]) of what is evicted, before it is free."""
        return self.tree.on_evict

    @on_evict.setter
    def on_evict(self, listener: Listener | None) -> None:
        self.tree.on_evict = listener

    # a request's life

    def probe(self, namespace: str, tokens: NDArray[np.int32], limit: int) -> Found:
        """How much of `tokens` is cached, looking at no more than `limit` tokens. Changes and locks nothing."""
        pages = self._match_pages(tokens, limit)
        if not self.enabled:
            return Found(0, None)
        return self.tree.find(namespace, tokens[: pages * self.page_size].tobytes(), pages)

    def match(
        self, namespace: str, tokens: NDArray[np.int32], limit: int, tables: Sequence[NDArray[np.int32]]
    ) -> Lease:
        """Lock the longest cached prefix of `tokens` that all groups can give, at most `limit` tokens.

        `tables`: a row for each group, all 0, which the lease fills from now on.
        """
        lease = Lease(namespace, tuple(tables), len(self.windows), self.has_states)
        lease.part = self.number
        if self.enabled:
            pages = self._match_pages(tokens, limit)
            data = tokens[: pages * self.page_size].tobytes()
            lease.node, found = self.tree.take(namespace, data, pages)
            if self._plain:
                lease.shared = lease.held = len(found)
                lease.tables[0][: len(found)] = found
            else:
                self.seat(lease, lease.node, sum(node.count for node in path_to(lease.node)))
        return lease

    def seat(self, lease: Lease, node: Node, depth: int) -> None:
        """Let a lease that has no pages go on from the end of `node`, which is locked for it, at page `depth`."""
        path = path_to(node)
        lease.node, lease.shared, lease.held = node, depth, depth
        if self.tree.whole:
            lease.tables[0][:depth] = np.concatenate([NO_PAGES, *(at.pages for at in path)])
        for account in self.windows:
            first = lease.first[account.index] = max(0, depth - account.reach)
            pages = np.concatenate([NO_PAGES, *(at.windows[account.index] for at in path)])[first:]
            account.lock(pages)
            lease.tables[account.group][first:depth] = pages
        if self.states is not None:
            lease.tables[-1][0] = node.state
            if node.state:
                self.states.lock(node.state)
                lease.snapshots.append((depth, node.state))

    def reserve(self, lease: Lease, tokens: int) -> bool:
        """Let the lease cover `tokens` positions. False, and nothing changes, when a group has not enough."""
        missing = -(-tokens // self.page_size) - lease.held
        if self._plain:
            if missing <= 0:
                return True
            pages = self._allocate_plain(missing)
            if pages is None:
                return False
            lease.tables[0][lease.held : lease.held + missing] = pages
            lease.held += missing
            return True
        missing = max(0, missing)
        slots = max(0, SLOTS - len(lease.own)) if self.states is not None else 0
        if missing == 0 and slots == 0:
            return True
        need = [missing] * self.paged + ([slots] if self.states is not None else [])
        for account in self.windows:  # of `skip`
            need[account.group] -= min(missing, max(0, lease.first[account.index] - lease.held))
        taken = self._allocate(need)
        if taken is None:
            return False
        for number in range(self.paged):
            lease.tables[number][lease.held + missing - need[number] : lease.held + missing] = taken[number]
        lease.held += missing
        if slots:
            lease.own += taken[-1].tolist()
            lease.tables[-1][1] = next(slot for slot in lease.own if slot != lease.tables[-1][0])
        return True

    def skip(self, lease: Lease, pages: int) -> None:
        """The first `pages` will not be computed but copied: of windows only what is read from there on is wanted."""
        for account in self.windows:
            old = lease.first[account.index]
            first = max(old, self.groups[account.group].first_needed(pages * self.page_size) // self.page_size)
            self.unlock_window(lease, account, old, min(first, lease.shared))
            lease.tables[account.group][old : min(first, lease.shared)] = 0
            lease.first[account.index] = first

    def own_state(self, lease: Lease) -> int:
        """A slot of its own that the next step reads the lease's state from: it is about to be filled."""
        row = lease.tables[-1]
        row[0] = next(slot for slot in lease.own if slot != row[1])
        return int(row[0])

    def reserve_one_each(self, leases: list[Lease]) -> bool:
        """One more page for each of these: a decode step's rows at a page border. All or nothing."""
        count = len(leases)
        if self._plain:
            pages = self._allocate_plain(count)
            if pages is None:
                return False
            for lease, page in zip(leases, pages.tolist(), strict=True):
                lease.tables[0][lease.held] = page
                lease.held += 1
            return True
        taken = self._allocate([count] * self.paged + ([0] if self.states is not None else []))
        if taken is None:
            return False
        for number in range(self.paged):
            for lease, page in zip(leases, taken[number].tolist(), strict=True):
                lease.tables[number][lease.held] = page
        for lease in leases:
            lease.held += 1
        return True

    def has_one_each(self, count: int) -> bool:
        """Whether `reserve_one_each` has pages for so many."""
        return all(self.allocators[at].available + self.evictable(at) >= count for at in range(self.paged))

    def turn(self, lease: Lease, end: int) -> None:
        """The step that writes the lease's state is launched: the next one reads what it wrote. Before any `commit`.

        `end`: the tokens that the state has taken in then; -1 where that is known only at the step's commit.
        """
        if lease.turns is None:
            return
        row = lease.tables[-1]
        read, write = row.tolist()
        lease.turns.append(Turn(self.tree.tick(), read, write, tuple(lease.own), lease.border))
        if end > 0 and end % self.page_size == 0 and self.enabled:
            self._stay(lease, end // self.page_size, write)
        kept = lease.border[1]
        row[0], row[1] = write, next(slot for slot in lease.own if slot not in (write, kept))

    def _stay(self, lease: Lease, border: int, slot: int) -> None:
        """Steps write into others than this slot until the next border; the lease needs a third one for that."""
        if len(lease.own) <= SLOTS:
            spare = self._allocate([0] * self.paged + [1])
            if spare is None:
                return
            lease.own.append(int(spare[-1][0]))
        lease.border = border, slot

    def given(self, lease: Lease) -> Given:
        """What `roll_back` must know of a commit: taken just before it."""
        start, held = lease.shared, lease.held
        return Given(lease, start, tuple(table[start:held].copy() for table in lease.tables[: self.paged]))

    def commit(self, lease: Lease, tokens: NDArray[np.int32], computed: int) -> None:
        """Give the tree every whole page among the first `computed` positions; `tokens` are the known ids.

        The state at the border behind them goes too, where the lease has it.
        """
        full = min(computed, len(tokens)) // self.page_size
        if not self.enabled:
            return
        if full > lease.shared:
            self._give(lease, tokens, full)
        if lease.border[0] == full == lease.shared:
            self._give_state(lease, full)

    def _give(self, lease: Lease, tokens: NDArray[np.int32], full: int) -> None:
        start = lease.shared
        data = tokens[start * self.page_size : full * self.page_size].tobytes()
        if self._plain:
            own = lease.tables[0][start:full]
            lease.node, kept, _ = self.tree.extend(lease.node, data, own)
            self.own[0] -= full - start
            twice = own != kept
            if twice.any():
                self.allocators[0].free(own[twice])
                own[:] = kept
            lease.shared = full
            return
        own = lease.tables[0][start:full] if self.tree.whole else NO_PAGES
        windows = [lease.tables[account.group][start:full] for account in self.windows]
        mine = [int((pages != 0).sum()) for pages in windows]
        lease.node, kept, freed = self.tree.extend(lease.node, data, own, windows)
        if self.tree.whole:
            self.own[0] -= full - start
            twice = own != kept
            self.allocators[0].free(own[twice])
            own[:] = kept
        for account, count, back in zip(self.windows, mine, freed, strict=True):
            self.own[account.group] -= count
            self.allocators[account.group].free(back)
            account.lock(lease.tables[account.group][max(start, lease.first[account.index]) : full])
        lease.shared = full

    def _give_state(self, lease: Lease, full: int) -> None:
        """The state that was kept at the node's end becomes its snapshot, where it has none."""
        slot, node = lease.border[1], lease.node
        if self.states is None or node.state or node.parent is None:
            return
        lease.own.remove(slot)
        lease.border = NO_BORDER
        self.own[-1] -= 1
        self.tree.put_state(node, slot)
        self.states.lock(slot)
        lease.snapshots.append((full, slot))

    def behind(self, lease: Lease, computed: int) -> None:
        """A step is committed: no token before `computed` is computed again, and what only those read is given back.

        Windows go back from the last page border, from where others may go on.
        """
        border = computed // self.page_size * self.page_size
        for account in self.windows:
            number, old = account.group, lease.first[account.index]
            first = min(self.groups[number].first_needed(border) // self.page_size, lease.held)
            if first <= old:
                continue
            row = lease.tables[number]
            self.unlock_window(lease, account, old, min(first, lease.shared))
            own = row[max(old, lease.shared) : first]
            self.own[number] -= len(own)
            self.allocators[number].free(own)
            row[old:first] = 0
            lease.first[account.index] = first
        if self.states is not None:
            while lease.snapshots and lease.snapshots[0][0] * self.page_size < computed:
                self.states.unlock(lease.snapshots.pop(0)[1])

    def unlock_window(self, lease: Lease, account: WindowPages, start: int, end: int) -> None:
        """Unlock pages [start, end) of a lease's pages in the tree, in one group with a window."""
        if start < end:
            nodes = ends_between(lease.node, lease.shared, start, end)
            account.unlock(lease.tables[account.group][start:end], nodes)

    def release(self, lease: Lease, tokens: NDArray[np.int32], computed: int, keep: bool = True) -> None:
        """End a lease. With `keep` its whole known pages go to the tree; without, its branch is dropped as well.

        `keep=False` is for a request that failed: what it computed may be wrong.
        """
        if keep:
            self.commit(lease, tokens, computed)
        self.free_own(lease)
        if lease.own:
            self.free_slots(lease, lease.own)
        if self.enabled:
            node = lease.node
            if self.gives_back:
                self.unlock_others(lease)
            self.tree.unlock(node)
            if keep:
                if not self.tree.whole:
                    self.tree.prune(node)
            else:
                self.allocators[0].free(self.tree.forget(node))
                self.collect()
        lease.empty()

    def free_own(self, lease: Lease) -> None:
        """Free the pages of its own that a lease has."""
        if self._plain:
            own = lease.tables[0][lease.shared : lease.held]
            self.own[0] -= len(own)
            self.allocators[0].free(own)
            return
        for number in range(self.paged):
            first = lease.first[number - self.paged] if self.groups[number].window else 0
            own = lease.tables[number][max(lease.shared, first) : lease.held]
            self.own[number] -= len(own)
            self.allocators[number].free(own)

    def free_slots(self, lease: Lease, slots: Sequence[int]) -> None:
        """Free slots of state that are a lease's own."""
        if slots:
            self.own[-1] -= len(slots)
            self.allocators[-1].free(np.array(slots, dtype=np.int32))

    def unlock_others(self, lease: Lease) -> None:
        """Give up every lock of a lease but that on its node; its table still says what they were for."""
        for account in self.windows:
            self.unlock_window(lease, account, lease.first[account.index], lease.shared)
        for _, slot in lease.snapshots:
            assert self.states is not None
            self.states.unlock(slot)

    def cut(self, lease: Lease, known: NDArray[np.int32], start: int, count: int) -> int:
        """How many tokens the chunk that begins at `start` should have, `count` at most.

        A state can be reused only where a snapshot was taken, so a chunk ends where one will be wanted: where the same
        tokens once more would be matched, where `known` leaves what the tree has, and every `state_interval` tokens.
        """
        if self.states is None or not self.enabled:
            return count
        size = self.page_size
        last = (len(known) - 1) // size * size
        places = [last, (start // self._interval + 1) * self._interval]
        if start % size == 0 and start // size == lease.shared and start < last:
            data = known[start:last].tobytes()
            places.append(start + self.tree.walk(lease.node, data, (last - start) // size)[1] * size)
        return min((place - start for place in places if start < place < start + count), default=count)

    # steps that did not happen

    def mark(self) -> int:
        """A moment to which `undo.roll_back` can return. Taken before the turns and commits of a launched step."""
        return self.tree.clock

    # locks of others

    def hold(self, node: Node) -> Hold:
        """Lock what the tree has up to the end of `node`, for a copy that does not run in launch order."""
        self.tree.lock(node)
        depth = sum(at.count for at in path_to(node))
        windows: list[NDArray[np.int32]] = []
        for account in self.windows:
            pages = [at.windows[account.index] for at in path_to(node)]
            found = np.concatenate([NO_PAGES, *pages])[max(0, depth - account.reach) :]
            windows.append(found[found != 0])
            account.lock(windows[-1])
        if self.states is not None and node.state:
            self.states.lock(node.state)
        hold = Hold(node, windows, node.state)
        self.holds.append(hold)
        return hold

    def hold_prefix(self, namespace: str, tokens: NDArray[np.int32], pages: int) -> tuple[Hold, NDArray[np.int32]]:
        """Lock the first pages of `tokens`, or those of them that are in the tree; gives these. One group alone."""
        node, found = self.tree.take(namespace, tokens[: pages * self.page_size].tobytes(), pages)
        hold = Hold(node, [], 0)
        self.holds.append(hold)
        return hold, found

    def drop(self, hold: Hold) -> None:
        """The copy has ended."""
        self.holds.remove(hold)
        depth = sum(at.count for at in path_to(hold.node))
        for account, pages in zip(self.windows, hold.windows, strict=True):
            nodes = ends_between(hold.node, depth, max(0, depth - account.reach), depth)
            account.unlock(pages, nodes)
        if hold.state and self.states is not None:
            self.states.unlock(hold.state)
        self.tree.unlock(hold.node)
        self.tree.prune(hold.node)

    # the whole

    def reset(self, leases: Iterable[Lease] = ()) -> None:
        """Forget every page and every lease (pass those in use: they are emptied). Holds are forgotten too."""
        for lease in leases:
            lease.empty()
        self.holds.clear()
        self.tree.clear()
        for number, allocator in enumerate(self.allocators):
            allocator.reset()
            self.own[number] = 0

    def cached(self, number: int) -> int:
        """Pages, or snapshots, that a group has in the tree."""
        account = self._account(number)
        return self.tree.pages if account is None else account.live

    def collect(self) -> None:
        """Free what has left the tree in groups whose pages can go before their node."""
        for account in self.windows:
            if account.loose:
                self.allocators[account.group].free(np.concatenate(account.loose))
                account.loose.clear()
        if self.states is not None and self.states.loose:
            self.allocators[-1].free(np.array(self.states.loose, dtype=np.int32))
            self.states.loose.clear()

    def _account(self, number: int) -> WindowPages | Snapshots | None:
        """Who accounts for a group's pages in the tree; None: the tree itself."""
        if number == self.paged:
            return self.states
        return self.windows[number - self.paged] if self.groups[number].window else None

    def evictable(self, number: int) -> int:
        """Pages, or snapshots, of a group that eviction would free."""
        account = self._account(number)
        return self.tree.evictable_pages if account is None else account.evictable

    def _match_pages(self, tokens: NDArray[np.int32], limit: int) -> int:
        return max(0, min(limit, len(tokens))) // self.page_size

    def _allocate_plain(self, count: int) -> NDArray[np.int32] | None:
        """As `_allocate`, where there is but one group, which keeps everything."""
        allocator, tree = self.allocators[0], self.tree
        short = count - allocator.available
        if short > 0:
            if short > tree.evictable_pages:
                return None
            evicted = tree.evict(short)
            self.evicted[0] += len(evicted)
            allocator.free(evicted)
        self.own[0] += count
        return allocator.allocate(count)

    def _allocate(self, need: Sequence[int]) -> list[NDArray[np.int32]] | None:
        """So many pages of each group, evicting where too few are free; None, and nothing changes, where that fails."""
        short = [count - allocator.available for count, allocator in zip(need, self.allocators, strict=True)]
        for number, count in enumerate(short):
            if count > 0 and count > self.evictable(number):
                return None
        for number, count in enumerate(need):
            self._evict(number, count - self.allocators[number].available)
        taken: list[NDArray[np.int32]] = []
        for number, allocator in enumerate(self.allocators):
            pages = allocator.allocate(need[number])
            assert pages is not None, f"group {number} has fewer pages than were counted"
            self.own[number] += need[number]
            taken.append(pages)
        return taken

    def _evict(self, number: int, count: int) -> None:
        """Evict so many pages of a group; with those of leaves goes what other groups keep of them."""
        if count <= 0:
            return
        before = [account.available for account in self.allocators]
        account = self._account(number)
        if account is None:
            self.allocators[number].free(self.tree.evict(count))
        else:
            self.tree.evict_from(account, count)
        self.collect()
        for at, allocator in enumerate(self.allocators):
            self.evicted[at] += allocator.available - before[at]
