//! What the machine's thread and its virtual processors' threads agree on: run, stop, a processor to run, power.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::devices::Power;
use crate::error::{Context, Result};
use crate::kick;

struct Thread {
    id: libc::pid_t,
    stopped: bool,
    ready: bool,
    /// A processor that the thread shall run from now on.
    next: Option<VcpuFd>,
    /// The one it has belongs to a machine that is over.
    give_up: bool,
}

struct State {
    stop: bool,
    threads: Vec<Thread>,
    power: VecDeque<Power>,
    ended: Vec<(u32, u32)>,
    lines: HashMap<(u32, u32), EventFd>,
}

/// Shared by all threads of one machine.
pub struct Control {
    state: Mutex<State>,
    changed: Condvar,
    stop: AtomicBool,
    wake: EventFd,
}

impl Control {
    /// Everything stopped, no processors yet.
    pub fn new(vp_count: u32) -> Result<Self> {
        let thread = |_| Thread {
            id: 0,
            stopped: false,
            ready: false,
            next: None,
            give_up: false,
        };
        Ok(Self {
            state: Mutex::new(State {
                stop: true,
                threads: (0..vp_count).map(thread).collect(),
                power: VecDeque::new(),
                ended: Vec::new(),
                lines: HashMap::new(),
            }),
            changed: Condvar::new(),
            stop: AtomicBool::new(true),
            wake: EventFd::new(EFD_NONBLOCK).context("threads")?,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable when the machine's thread has something to look at.
    pub fn event(&self) -> &EventFd {
        &self.wake
    }

    // --- virtual processors' threads ---

    /// The calling thread is this virtual processor's, and its sandbox stands.
    pub fn ready(&self, vp: u32) {
        if let Some(thread) = self.state().threads.get_mut(vp as usize) {
            thread.id = kick::this_thread();
            thread.ready = true;
        }
        self.changed.notify_all();
    }

    /// Whether the machine wants a stop.
    pub fn stop_wanted(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Waits until this processor may run; false when there is no such thread.
    pub fn wait(&self, vp: u32, vcpu: &mut Option<VcpuFd>) -> bool {
        let mut state = self.state();
        loop {
            let stop = state.stop;
            let Some(thread) = state.threads.get_mut(vp as usize) else {
                return false;
            };
            let gave_up = std::mem::take(&mut thread.give_up);
            if gave_up {
                *vcpu = None;
            }
            if let Some(next) = thread.next.take() {
                *vcpu = Some(next);
            }
            let was = thread.stopped;
            thread.stopped = stop || vcpu.is_none();
            if !thread.stopped {
                return true;
            }
            // Only when something changed: two threads that wait would wake each other for ever.
            if !was {
                let _ = self.wake.write(1);
            }
            if gave_up {
                self.changed.notify_all();
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The guest asked for this; nobody runs it further until the machine has seen to it.
    pub fn power(&self, power: Power) {
        let mut state = self.state();
        state.power.push_back(power);
        state.stop = true;
        self.stop.store(true, Ordering::Release);
        let _ = self.wake.write(1);
    }

    /// A message was lost with its slot: the host is owed an EOM.
    pub fn message_ended(&self, vp: u32, sint: u32) {
        self.state().ended.push((vp, sint));
        let _ = self.wake.write(1);
    }

    /// Raises a SINT's interrupt.
    pub fn raise(&self, vp: u32, sint: u32) {
        if let Some(line) = self.state().lines.get(&(vp, sint)) {
            let _ = line.write(1);
        }
    }

    // --- the machine's thread ---

    /// Waits until every thread has called `ready`.
    pub fn wait_ready(&self) {
        let state = self.state();
        let missing = |state: &mut State| state.threads.iter().any(|thread| !thread.ready);
        drop(self.changed.wait_while(state, missing));
    }

    /// What raises a SINT from now on.
    pub fn set_line(&self, vp: u32, sint: u32, line: EventFd) {
        self.state().lines.insert((vp, sint), line);
    }

    /// Makes a processor look at its slots.
    pub fn kick(&self, vp: u32) {
        let state = self.state();
        if let Some(thread) = state
            .threads
            .get(vp as usize)
            .filter(|thread| !thread.stopped)
        {
            kick::kick(thread.id);
        }
    }

    /// Stops every processor; they have stopped when `stopped` says so.
    pub fn stop(&self) {
        let mut state = self.state();
        state.stop = true;
        self.stop.store(true, Ordering::Release);
        for thread in state.threads.iter().filter(|thread| !thread.stopped) {
            kick::kick(thread.id);
        }
    }

    /// Whether nobody runs.
    pub fn stopped(&self) -> bool {
        self.state().threads.iter().all(|thread| thread.stopped)
    }

    /// Lets every processor run.
    pub fn run(&self) {
        let mut state = self.state();
        state.stop = false;
        self.stop.store(false, Ordering::Release);
        drop(state);
        self.changed.notify_all();
    }

    /// While stopped: every thread lets go of its processor. Returns when they have.
    pub fn give_up(&self) {
        let mut state = self.state();
        state.lines.clear();
        for thread in &mut state.threads {
            thread.give_up = true;
        }
        self.changed.notify_all();
        let held = |state: &mut State| state.threads.iter().any(|thread| thread.give_up);
        drop(self.changed.wait_while(state, held));
    }

    /// While stopped: the processors to run next, in their order.
    pub fn hand_out(&self, vcpus: Vec<VcpuFd>) {
        let mut state = self.state();
        for (thread, vcpu) in state.threads.iter_mut().zip(vcpus) {
            thread.next = Some(vcpu);
        }
    }

    /// What the guest asked for since the last call.
    pub fn take_power(&self) -> Option<Power> {
        self.state().power.pop_front()
    }

    /// The messages that were lost since the last call.
    pub fn take_ended(&self) -> Vec<(u32, u32)> {
        std::mem::take(&mut self.state().ended)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn stopped_threads_sleep_and_what_is_asked_of_them_happens() {
        let control = Arc::new(Control::new(3).unwrap());
        for vp in 0..3 {
            let control = Arc::clone(&control);
            let body = move || {
                control.ready(vp);
                control.wait(vp, &mut None)
            };
            let named = std::thread::Builder::new().name(format!("waiting{vp}"));
            named.spawn(body).unwrap();
        }
        control.wait_ready();
        let limit = Instant::now() + Duration::from_secs(5);
        while !control.stopped() {
            assert!(Instant::now() < limit);
            std::thread::yield_now();
        }
        // A thread that wakes the others when it wakes up keeps the lock busy without end.
        let before = cpu_time();
        std::thread::sleep(Duration::from_millis(200));
        let used = cpu_time() - before;
        assert!(
            used < Duration::from_millis(100),
            "{used:?} in 200 ms of rest"
        );
        control.give_up();
        control.power(Power::Reset);
        assert!(control.stop_wanted());
        assert_eq!(control.take_power(), Some(Power::Reset));
        assert_eq!(control.take_power(), None);
        assert!(!control.wait(3, &mut None), "there is no fourth");
    }

    /// Of the threads that wait, so far.
    fn cpu_time() -> Duration {
        let read = |task: &std::path::Path, file| std::fs::read_to_string(task.join(file)).ok();
        let spent = |task: &std::path::Path| {
            read(task, "comm").filter(|name| name.starts_with("waiting"))?;
            read(task, "schedstat")?
                .split(' ')
                .next()?
                .parse::<u64>()
                .ok()
        };
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let all = tasks.filter_map(|task| spent(&task.ok()?.path())).sum();
        Duration::from_nanos(all)
    }
}
