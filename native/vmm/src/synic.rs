//! The guest's side of the SynIC: message slots in the guest's SIMP page, and what the host knows of the registers.
//!
//! Slots are written in virtual-processor context alone, where KVM's synthetic timers cannot write them at the same time. Every
//! message carries the flag "message pending", so that the guest always writes the EOM register when it has emptied the slot.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};
use vswitch_wire::door::{MESSAGE_SIZE, SINT_COUNT};

use crate::memory::Memory;

pub const MSR_GUEST_OS_ID: u32 = 0x4000_0000;
pub const MSR_HYPERCALL: u32 = 0x4000_0001;
pub const MSR_TIME_REF_COUNT: u32 = 0x4000_0020;
pub const MSR_SCONTROL: u32 = 0x4000_0080;
pub const MSR_SIEFP: u32 = 0x4000_0082;
pub const MSR_SIMP: u32 = 0x4000_0083;
pub const MSR_SINT0: u32 = 0x4000_0090;
const ENABLE: u64 = 1;
const PAGE: u64 = 4096;
/// What the door takes: vector, masked, AutoEOI, polling.
const SINT_BITS: u64 = 0xFF | 1 << 16 | 1 << 17 | 1 << 18;
const SINT_RESET: u64 = 1 << 16;
const FLAGS: usize = 5;
const PENDING: u8 = 1;

/// SynIC registers of one virtual processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    pub control: u64,
    pub siefp: u64,
    pub simp: u64,
    pub sints: [u64; SINT_COUNT as usize],
    /// The partition's, as this processor saw them.
    pub guest_os_id: u64,
    pub hypercall: u64,
}

impl Default for Registers {
    fn default() -> Self {
        Self {
            control: 0,
            siefp: 0,
            simp: 0,
            sints: [SINT_RESET; SINT_COUNT as usize],
            guest_os_id: 0,
            hypercall: 0,
        }
    }
}

/// A page register as the host is told of it: one that names a page outside memory would be refused there, and the host would
/// keep the page before. It counts as switched off instead: nothing can be written there.
pub fn usable(memory: &Memory, register: u64) -> u64 {
    if register & ENABLE != 0 && !memory.address_in_range(page_of(register)) {
        register & !ENABLE
    } else {
        register
    }
}

fn page_of(register: u64) -> GuestAddress {
    GuestAddress(register & !(PAGE - 1))
}

impl Registers {
    /// The partition's registers as (MSR, value), in an order in which each write makes sense to the host.
    fn of_partition(&self) -> [(u32, u64); 2] {
        [
            (MSR_GUEST_OS_ID, self.guest_os_id),
            (MSR_HYPERCALL, self.hypercall),
        ]
    }

    /// The same of the processor's own.
    fn of_processor(&self) -> impl Iterator<Item = (u32, u64)> + '_ {
        let pages = [(MSR_SIMP, self.simp), (MSR_SIEFP, self.siefp)];
        let sints = (MSR_SINT0..).zip(self.sints.iter().map(|sint| sint & SINT_BITS));
        let control = (MSR_SCONTROL, self.control & ENABLE);
        pages.into_iter().chain(sints).chain([control])
    }

    fn values(&self) -> impl Iterator<Item = (u32, u64)> + '_ {
        self.of_partition().into_iter().chain(self.of_processor())
    }

    /// What differs from `before`.
    pub fn changes(&self, before: &Self) -> Vec<(u32, u64)> {
        let pairs = self.values().zip(before.values());
        pairs
            .filter(|(now, then)| now != then)
            .map(|(now, _)| now)
            .collect()
    }

    /// The message page, while messages may be written.
    fn message_page(&self) -> Option<GuestAddress> {
        (self.control & self.simp & ENABLE != 0).then_some(page_of(self.simp))
    }
}

/// A message that is to go into a slot.
pub struct Waiting {
    pub sint: u32,
    pub message: Box<[u8; MESSAGE_SIZE]>,
}

#[derive(Default)]
struct State {
    registers: Registers,
    waiting: Vec<Waiting>,
    /// Type word of the message of ours that lies in each slot; 0 = none.
    written: [u32; SINT_COUNT as usize],
    /// SINTs whose message is gone with the page it lay in; `write` gives them.
    gone: Vec<u32>,
    /// Grows with every change of any processor's registers: whose view of the partition's is the newest.
    stamp: u64,
}

impl State {
    /// Every message that lies in a slot is gone.
    fn abandon(&mut self) {
        for (sint, written) in (0..).zip(&mut self.written) {
            if std::mem::take(written) != 0 {
                self.gone.push(sint);
            }
        }
    }
}

/// The slots of one virtual processor.
#[derive(Default)]
pub struct Slots {
    state: Mutex<State>,
    attention: AtomicBool,
}

impl Slots {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a message; the virtual processor writes it when it comes out of the guest next. The door lets at most one per
    /// SINT through.
    pub fn queue(&self, waiting: Waiting) {
        self.state().waiting.push(waiting);
        self.attention.store(true, Ordering::Release);
    }

    /// Whether `write` has something to do.
    pub fn wanted(&self) -> bool {
        self.attention.load(Ordering::Acquire)
    }

    /// The registers as the virtual processor set them last.
    pub fn registers(&self) -> Registers {
        self.state().registers
    }

    /// Takes the registers' new values; gives those before. Pages that come into use are emptied, as a hypervisor's own
    /// page would be; a message in a page that goes out of use is lost.
    pub fn set_registers(&self, memory: &Memory, new: Registers) -> Registers {
        static STAMP: AtomicU64 = AtomicU64::new(1);
        let mut state = self.state();
        let before = std::mem::replace(&mut state.registers, new);
        state.stamp = STAMP.fetch_add(1, Ordering::Relaxed);
        if new.message_page() != before.message_page() {
            state.abandon();
        }
        for (now, then) in [(new.simp, before.simp), (new.siefp, before.siefp)] {
            if now & ENABLE != 0 && now != then {
                // A page outside memory: nothing to empty, and nothing will be written there either.
                let _ = memory.write_slice(&[0; PAGE as usize], page_of(now));
            }
        }
        self.attention.store(true, Ordering::Release);
        before
    }

    /// In virtual-processor context: writes what waits into free slots. `raise` gets each SINT that was filled; what is
    /// returned was lost because the guest has switched its messages off or moved their page (EOM is due for these).
    pub fn write(&self, memory: &Memory, mut raise: impl FnMut(u32)) -> Vec<u32> {
        let mut state = self.state();
        self.attention.store(false, Ordering::Release);
        let mut ended = std::mem::take(&mut state.gone);
        let Some(page) = state.registers.message_page() else {
            ended.extend(state.waiting.drain(..).map(|waiting| waiting.sint));
            return ended;
        };
        for waiting in std::mem::take(&mut state.waiting) {
            match put(memory, page, &waiting) {
                Ok(Some(kind)) => {
                    if let Some(place) = state.written.get_mut(waiting.sint as usize) {
                        *place = kind;
                    }
                    raise(waiting.sint);
                }
                // The guest writes EOM when it has emptied the slot; `emptied` then says to try again.
                Ok(None) => state.waiting.push(waiting),
                Err(_) => ended.push(waiting.sint),
            }
        }
        ended
    }

    /// After an EOM of the guest: the SINTs whose message it has taken, and whether others can be tried now.
    pub fn emptied(&self, memory: &Memory) -> (Vec<u32>, bool) {
        let mut state = self.state();
        let page = state.registers.message_page();
        let mut taken = Vec::new();
        for (sint, written) in state.written.iter_mut().enumerate() {
            if *written == 0 {
                continue;
            }
            let there = page.and_then(|page| {
                let slot = page.checked_add((sint * MESSAGE_SIZE) as u64)?;
                memory.load::<u32>(slot, Ordering::Acquire).ok()
            });
            // Something else than ours there, such as a timer's message: ours has been taken before.
            if there != Some(*written) {
                *written = 0;
                taken.push(sint as u32);
            }
        }
        let again = !state.waiting.is_empty();
        if again {
            self.attention.store(true, Ordering::Release);
        }
        (taken, again)
    }

    /// Forgets messages (the door is lost); registers too when the machine starts anew.
    pub fn forget(&self, registers: bool) {
        let mut state = self.state();
        state.waiting.clear();
        state.gone.clear();
        state.written = Default::default();
        if registers {
            state.registers = Registers::default();
            state.stamp = 0;
        }
    }
}

/// What the guest has taken from the slots of all processors.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Emptied {
    /// (VP, SINT) whose message is gone: EOM is due.
    pub taken: Vec<(u32, u32)>,
    /// Processors that have messages to be tried again.
    pub again: Vec<u32>,
}

/// `Slots::emptied` of each processor.
pub fn all_emptied(all: &[Arc<Slots>], memory: &Memory) -> Emptied {
    let mut emptied = Emptied::default();
    for (vp, slots) in (0..).zip(all) {
        let (taken, again) = slots.emptied(memory);
        emptied
            .taken
            .extend(taken.into_iter().map(|sint| (vp, sint)));
        emptied.again.extend(again.then_some(vp));
    }
    emptied
}

/// Gives every register of every processor as (VP, MSR, value) while none of them can change: to a host that may have missed
/// any of them, also that one is as after a reset. The partition's own come once, first, as they were seen last.
pub fn tell_all(all: &[Arc<Slots>], mut tell: impl FnMut(u32, u32, u64)) {
    let states: Vec<_> = all.iter().map(|slots| slots.state()).collect();
    let newest = (0..).zip(&states).max_by_key(|(_, state)| state.stamp);
    if let Some((vp, state)) = newest {
        for (msr, value) in state.registers.of_partition() {
            tell(vp, msr, value);
        }
    }
    for (vp, state) in (0..).zip(&states) {
        for (msr, value) in state.registers.of_processor() {
            tell(vp, msr, value);
        }
    }
}

/// Writes a message if its slot is free: the type word last. Gives that word, or None when the slot is in use.
fn put(
    memory: &Memory,
    page: GuestAddress,
    waiting: &Waiting,
) -> Result<Option<u32>, GuestMemoryError> {
    let offset = u64::from(waiting.sint) * MESSAGE_SIZE as u64;
    let slot = page
        .checked_add(offset)
        .ok_or(GuestMemoryError::InvalidGuestAddress(page))?;
    if memory.load::<u32>(slot, Ordering::Acquire)? != 0 {
        let flags = slot.unchecked_add(FLAGS as u64);
        let now = memory.load::<u8>(flags, Ordering::Relaxed)?;
        memory.store(now | PENDING, flags, Ordering::SeqCst)?;
        // Emptied meanwhile, without a look at the flag: the slot is free, and no EOM will come.
        if memory.load::<u32>(slot, Ordering::SeqCst)? != 0 {
            return Ok(None);
        }
    }
    let mut message = *waiting.message;
    let kind = u32::from_le_bytes([message[0], message[1], message[2], message[3]]);
    message[FLAGS] |= PENDING;
    let (_, rest) = message.split_at(4);
    memory.write_slice(rest, slot.unchecked_add(4))?;
    memory.store(kind, slot, Ordering::Release)?;
    Ok(Some(kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIMP: u64 = 0x3000;

    fn memory() -> Memory {
        Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap()
    }

    fn enabled() -> Registers {
        Registers {
            control: 1,
            simp: SIMP | 1,
            ..Registers::default()
        }
    }

    fn message(sint: u32, kind: u32) -> Waiting {
        let mut message = Box::new([0xAB; MESSAGE_SIZE]);
        message[..4].copy_from_slice(&kind.to_le_bytes());
        message[FLAGS] = 0;
        Waiting { sint, message }
    }

    fn slot(memory: &Memory, sint: u64) -> u32 {
        memory.read_obj(GuestAddress(SIMP + sint * 256)).unwrap()
    }

    #[test]
    fn a_message_is_written_once_and_ends_when_the_guest_took_it() {
        let (memory, slots) = (memory(), Slots::default());
        slots.set_registers(&memory, enabled());
        slots.queue(message(2, 1));
        assert!(slots.wanted());
        let mut raised = Vec::new();
        assert!(slots.write(&memory, |sint| raised.push(sint)).is_empty());
        assert_eq!(raised, [2]);
        assert!(!slots.wanted());
        assert_eq!(slot(&memory, 2), 1);
        let flags: u8 = memory.read_obj(GuestAddress(SIMP + 2 * 256 + 5)).unwrap();
        assert_eq!(flags, PENDING);
        let rest: u8 = memory.read_obj(GuestAddress(SIMP + 2 * 256 + 255)).unwrap();
        assert_eq!(rest, 0xAB);
        assert_eq!(slots.emptied(&memory), (vec![], false));
        memory
            .write_obj(0u32, GuestAddress(SIMP + 2 * 256))
            .unwrap();
        assert_eq!(slots.emptied(&memory), (vec![2], false));
        assert_eq!(slots.emptied(&memory), (vec![], false));
    }

    #[test]
    fn a_slot_in_use_is_waited_for() {
        let (memory, slots) = (memory(), Slots::default());
        slots.set_registers(&memory, enabled());
        let timer = 0x8000_0010u32;
        memory
            .write_obj(timer, GuestAddress(SIMP + 2 * 256))
            .unwrap();
        slots.queue(message(2, 1));
        slots.write(&memory, |_| panic!("the slot was in use"));
        let flags: u8 = memory.read_obj(GuestAddress(SIMP + 2 * 256 + 5)).unwrap();
        assert_eq!(flags & PENDING, PENDING, "the guest is asked for an EOM");
        memory
            .write_obj(0u32, GuestAddress(SIMP + 2 * 256))
            .unwrap();
        assert_eq!(slots.emptied(&memory), (vec![], true));
        let mut raised = 0;
        slots.write(&memory, |_| raised += 1);
        assert_eq!((raised, slot(&memory, 2)), (1, 1));
        // Taken, and the timer's message lies there now.
        memory
            .write_obj(timer, GuestAddress(SIMP + 2 * 256))
            .unwrap();
        assert_eq!(slots.emptied(&memory), (vec![2], false));
    }

    #[test]
    fn messages_switched_off_are_lost_and_ended() {
        let (memory, slots) = (memory(), Slots::default());
        slots.set_registers(&memory, enabled());
        slots.queue(message(2, 1));
        slots.write(&memory, |_| {});
        slots.queue(message(3, 1));
        slots.set_registers(&memory, Registers::default());
        let mut ended = slots.write(&memory, |_| panic!("nothing may be written"));
        ended.sort_unstable();
        assert_eq!(ended, [2, 3]);
    }

    #[test]
    fn a_message_whose_page_moved_is_lost_and_ended_once() {
        let (memory, slots) = (memory(), Slots::default());
        slots.set_registers(&memory, enabled());
        slots.queue(message(2, 1));
        slots.write(&memory, |_| {});
        slots.queue(message(3, 1));
        let moved = Registers {
            simp: 0x5000 | 1,
            ..enabled()
        };
        slots.set_registers(&memory, moved);
        assert!(slots.wanted());
        let mut raised = Vec::new();
        assert_eq!(slots.write(&memory, |sint| raised.push(sint)), [2]);
        assert_eq!(raised, [3], "what had no slot yet goes into the new page");
        let kind: u32 = memory.read_obj(GuestAddress(0x5000 + 3 * 256)).unwrap();
        assert_eq!(kind, 1);
        assert_eq!(slots.emptied(&memory), (vec![], false));
        // A register that leaves the page where it is ends nothing; off and on again does.
        let moved = Registers { siefp: 0, ..moved };
        slots.set_registers(&memory, moved);
        assert!(slots.write(&memory, |_| {}).is_empty());
        slots.set_registers(&memory, Registers::default());
        slots.set_registers(&memory, moved);
        assert_eq!(slots.write(&memory, |_| {}), [3]);
    }

    #[test]
    fn one_processor_may_take_the_messages_of_all() {
        let memory = memory();
        let all: Vec<Arc<Slots>> = (0..2).map(|_| Arc::default()).collect();
        for (slots, simp) in all.iter().zip([SIMP, 0x5000]) {
            let registers = Registers {
                simp: simp | 1,
                ..enabled()
            };
            slots.set_registers(&memory, registers);
            slots.queue(message(2, 1));
            slots.write(&memory, |_| {});
            slots.queue(message(2, 1));
            slots.write(&memory, |_| panic!("the slot is in use"));
        }
        memory
            .write_obj(0u32, GuestAddress(0x5000 + 2 * 256))
            .unwrap();
        let wanted = Emptied {
            taken: vec![(1, 2)],
            again: vec![0, 1],
        };
        assert_eq!(all_emptied(&all, &memory), wanted);
        assert!(all_emptied(&all, &memory).taken.is_empty());
    }

    #[test]
    fn a_host_that_comes_back_is_told_every_register_and_the_partitions_once() {
        let memory = memory();
        let all: Vec<Arc<Slots>> = (0..3).map(|_| Arc::default()).collect();
        let told = || {
            let mut told = Vec::new();
            tell_all(&all, |vp, msr, value| told.push((vp, msr, value)));
            told
        };
        let partition = |guest_os_id, hypercall| Registers {
            guest_os_id,
            hypercall,
            ..enabled()
        };
        all[1].set_registers(&memory, partition(7, 0x6001));
        let first = told();
        assert_eq!(
            first[..2],
            [(1, MSR_GUEST_OS_ID, 7), (1, MSR_HYPERCALL, 0x6001)]
        );
        assert_eq!(first.len(), 2 + 3 * 19);
        assert!(first.contains(&(1, MSR_SCONTROL, 1)));
        assert!(first.contains(&(0, MSR_SCONTROL, 0)));
        // Processor 1 has not looked since another one switched the page off.
        all[2].set_registers(&memory, partition(0, 0));
        all[2].set_registers(&memory, Registers::default());
        let second = told();
        assert_eq!(
            second[..2],
            [(2, MSR_GUEST_OS_ID, 0), (2, MSR_HYPERCALL, 0)]
        );
        for entry in [
            (2, MSR_SIMP, 0),
            (2, MSR_SCONTROL, 0),
            (2, MSR_SINT0 + 2, SINT_RESET),
        ] {
            assert!(second.contains(&entry), "{entry:x?}");
        }
    }

    #[test]
    fn a_page_outside_memory_counts_as_switched_off() {
        let memory = memory();
        for good in [SIMP | 1, SIMP, 0xF000 | 1, 0x10000] {
            assert_eq!(usable(&memory, good), good);
        }
        for bad in [0x10001, u64::MAX, 0xFFFF_FFFF_FFFF_F001] {
            assert_eq!(usable(&memory, bad), bad & !1);
        }
    }

    #[test]
    fn pages_outside_memory_hurt_nobody() {
        let (memory, slots) = (memory(), Slots::default());
        for simp in [0x10001, u64::MAX, 0xFFFF_FFFF_FFFF_F001] {
            let registers = Registers {
                control: 1,
                simp,
                siefp: simp,
                ..Registers::default()
            };
            slots.set_registers(&memory, registers);
            slots.queue(message(15, 1));
            assert_eq!(slots.write(&memory, |_| {}), [15]);
        }
    }

    #[test]
    fn only_changes_go_to_the_host() {
        let before = Registers::default();
        let mut now = enabled();
        now.sints[2] = 0xF3 | 1 << 20;
        let changes = now.changes(&before);
        let wanted = [
            (MSR_SIMP, SIMP | 1),
            (MSR_SINT0 + 2, 0xF3),
            (MSR_SCONTROL, 1),
        ];
        assert_eq!(changes, wanted);
        assert!(now.changes(&now).is_empty());
    }
}
