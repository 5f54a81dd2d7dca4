//! A virtual processor's thread: runs the guest, serves its exits, and stops where the machine wants it to.

use std::sync::Arc;

use kvm_bindings::{kvm_msr_entry, Msrs, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vswitch_wire::door::{DoorMessage, Hypercall, SINT_COUNT};

use crate::control::Control;
use crate::devices::{Ports, Power};
use crate::door::Answer;
use crate::exits::{self, HyperV};
use crate::kick;
use crate::memory::Memory;
use crate::requests::Requests;
use crate::synic::{self, Registers, Slots, MSR_GUEST_OS_ID, MSR_HYPERCALL, MSR_SINT0};

const SIGNAL_EVENT: u64 = 0x5D;
const STATUS_INVALID_CONNECTION_ID: u64 = 0x12;
const STATUS_INSUFFICIENT_BUFFERS: u64 = 0x13;

/// What a processor's thread works with.
pub struct Processor {
    pub vp: u32,
    pub memory: Memory,
    pub ports: Arc<Ports>,
    pub control: Arc<Control>,
    pub requests: Arc<Requests>,
    pub slots: Arc<Slots>,
}

/// Why the loop around KVM_RUN looks up.
enum Next {
    Run,
    Hyperv,
    Power(Power),
    /// The processor cannot go on; its run structure says why.
    Stuck,
}

impl Processor {
    /// The thread's body; returns when the machine ends.
    pub fn serve(self) {
        let mut vcpu: Option<VcpuFd> = None;
        loop {
            kick::bind(None);
            if !self.control.wait(self.vp, &mut vcpu) {
                return;
            }
            let Some(running) = &mut vcpu else { continue };
            kick::bind(Some(running));
            if let Some(power) = self.run(running) {
                self.control.power(power);
            }
        }
    }

    /// Runs until the machine wants a stop (None) or the guest asked for something that concerns all of it.
    fn run(&self, vcpu: &mut VcpuFd) -> Option<Power> {
        loop {
            if self.control.stop_wanted() {
                return None;
            }
            if self.slots.wanted() {
                self.write_messages();
            }
            match self.enter(vcpu) {
                Next::Run => {}
                Next::Hyperv => {
                    if let Some(power) = self.hyperv(vcpu) {
                        return Some(power);
                    }
                }
                Next::Power(power) => return Some(power),
                Next::Stuck => return Some(Power::Crashed(exits::failure(vcpu))),
            }
        }
    }

    fn enter(&self, vcpu: &mut VcpuFd) -> Next {
        let exit = match vcpu.run() {
            Ok(exit) => exit,
            Err(error) if error.errno() == libc::EINTR => {
                // What the kick was for is looked at before the next entry.
                vcpu.set_kvm_immediate_exit(0);
                return Next::Run;
            }
            // A processor that waits for its start has been woken.
            Err(error) if error.errno() == libc::EAGAIN => return Next::Run,
            Err(error) => {
                let why = format!("KVM cannot run its processor: {error}");
                return Next::Power(Power::Crashed(why));
            }
        };
        match exit {
            VcpuExit::IoOut(port, data) => {
                self.ports.write(port, data).map_or(Next::Run, Next::Power)
            }
            VcpuExit::IoIn(port, data) => {
                self.ports.read(port, data);
                Next::Run
            }
            VcpuExit::MmioRead(_, data) => {
                data.fill(0xFF);
                Next::Run
            }
            VcpuExit::MmioWrite(..) => Next::Run,
            VcpuExit::Hyperv => Next::Hyperv,
            VcpuExit::Shutdown => Next::Power(Power::crashed("triple fault")),
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Next::Power(Power::Reset),
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _) => {
                Next::Power(Power::crashed("the guest reported a crash"))
            }
            // An interrupted wait.
            VcpuExit::Intr => Next::Run,
            // KVM failed, or left with something that this machine never asked for: entering anew would meet it again.
            _ => Next::Stuck,
        }
    }

    fn write_messages(&self) {
        let raise = |sint| self.control.raise(self.vp, sint);
        for sint in self.slots.write(&self.memory, raise) {
            self.control.message_ended(self.vp, sint);
        }
    }

    fn hyperv(&self, vcpu: &mut VcpuFd) -> Option<Power> {
        match exits::hyperv(vcpu)? {
            HyperV::Synic {
                control,
                siefp,
                simp,
            } => {
                let mut registers = self.slots.registers();
                registers.control = control;
                registers.siefp = synic::usable(&self.memory, siefp);
                registers.simp = synic::usable(&self.memory, simp);
                if read_back(vcpu, &mut registers).is_none() {
                    return Some(Power::crashed("KVM does not give its SynIC registers back"));
                }
                self.forward(registers);
            }
            HyperV::Hypercall { input, parameters } => {
                exits::finish_hypercall(vcpu, self.hypercall(input, parameters));
            }
        }
        None
    }

    /// Tells the host what changed, in the order in which it makes sense.
    fn forward(&self, registers: Registers) {
        let before = self.slots.set_registers(&self.memory, registers);
        for (msr, value) in registers.changes(&before) {
            let write = DoorMessage::MsrWrite {
                vp: self.vp,
                msr,
                value,
            };
            // KVM has taken the value already, so a refusal cannot become a fault. There is none but for a privilege that
            // the guest lacks, and then the host has no register of this kind: pages that it would refuse count as switched
            // off here too (`usable`). Without a door: all registers are told when it is open again.
            if self.requests.ask(&write).is_none() {
                break;
            }
        }
        self.write_messages();
    }

    fn hypercall(&self, input: u64, parameters: [u64; 2]) -> u64 {
        let [rdx, r8] = parameters;
        let call = DoorMessage::Hypercall(Hypercall {
            vp: self.vp,
            rcx: input,
            rdx,
            r8,
            xmm: [0; 96],
        });
        match self.requests.ask(&call) {
            Some(Answer::Hypercall(result)) => result,
            // No host: nothing listens at a connection, and a message may be posted again later.
            _ if input & 0xFFFF == SIGNAL_EVENT => STATUS_INVALID_CONNECTION_ID,
            _ => STATUS_INSUFFICIENT_BUFFERS,
        }
    }
}

/// The registers that KVM keeps to itself.
fn read_back(vcpu: &VcpuFd, registers: &mut Registers) -> Option<()> {
    let numbers = [MSR_GUEST_OS_ID, MSR_HYPERCALL]
        .into_iter()
        .chain(MSR_SINT0..MSR_SINT0 + SINT_COUNT);
    let entries: Vec<kvm_msr_entry> = numbers
        .map(|index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .collect();
    let mut msrs = Msrs::from_entries(&entries).ok()?;
    if vcpu.get_msrs(&mut msrs).ok()? != entries.len() {
        return None;
    }
    let (partition, sints) = msrs.as_slice().split_first_chunk::<2>()?;
    registers.guest_os_id = partition[0].data;
    registers.hypercall = partition[1].data;
    for (place, entry) in registers.sints.iter_mut().zip(sints) {
        *place = entry.data;
    }
    Some(())
}
