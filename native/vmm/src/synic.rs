//! The guest's side of the SynIC: message slots in the guest's SIMP page, and what the host knows of the registers.
//!
//! Slots are written in virtual-processor context alone, where KVM's synthetic timers cannot write them at the same time. Every
//! message carries the flag "message pending", so that the guest always writes the EOM register when it has emptied the slot.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError};
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

impl Registers {
    /// Every register as (MSR, value), in an order in which each write makes sense to the host.
    pub fn values(&self) -> Vec<(u32, u64)> {
        let mut values = vec![
            (MSR_GUEST_OS_ID, self.guest_os_id),
            (MSR_HYPERCALL, self.hypercall),
            (MSR_SIMP, self.simp),
            (MSR_SIEFP, self.siefp),
        ];
        let sints = (MSR_SINT0..).zip(self.sints.iter().map(|sint| sint & SINT_BITS));
        values.extend(sints);
        values.push((MSR_SCONTROL, self.control & ENABLE));
        values
    }

    /// What differs from `before`.
    pub fn changes(&self, before: &Self) -> Vec<(u32, u64)> {
        let pairs = self.values().into_iter().zip(before.values());
        pairs
            .filter(|(now, then)| now != then)
            .map(|(now, _)| now)
            .collect()
    }

    /// The message page, while messages may be written.
    fn message_page(&self) -> Option<GuestAddress> {
        (self.control & self.simp & ENABLE != 0).then_some(GuestAddress(self.simp & !(PAGE - 1)))
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

    /// Runs with the registers while the virtual processor cannot change them.
    pub fn with_registers(&self, act: impl FnOnce(&Registers)) {
        act(&self.state().registers);
    }

    /// Takes the registers' new values; gives those before. Pages that come into use are emptied, as a hypervisor's own
    /// page would be.
    pub fn set_registers(&self, memory: &Memory, new: Registers) -> Registers {
        let mut state = self.state();
        let before = std::mem::replace(&mut state.registers, new);
        for (now, then) in [(new.simp, before.simp), (new.siefp, before.siefp)] {
            if now & ENABLE != 0 && now != then {
                // A page outside memory: nothing to empty, and nothing will be written there either.
                let _ = memory.write_slice(&[0; PAGE as usize], GuestAddress(now & !(PAGE - 1)));
            }
        }
        self.attention.store(true, Ordering::Release);
        before
    }

    /// In virtual-processor context: writes what waits into free slots. `raise` gets each SINT that was filled; what is
    /// returned was lost because the guest has switched its messages off (EOM is due for these).
    pub fn write(&self, memory: &Memory, mut raise: impl FnMut(u32)) -> Vec<u32> {
        let mut state = self.state();
        self.attention.store(false, Ordering::Release);
        let mut ended = Vec::new();
        let Some(page) = state.registers.message_page() else {
            ended.extend(state.waiting.drain(..).map(|waiting| waiting.sint));
            for (sint, written) in state.written.iter_mut().enumerate() {
                if std::mem::take(written) != 0 {
                    ended.push(sint as u32);
                }
            }
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
        state.written = Default::default();
        if registers {
            state.registers = Registers::default();
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
