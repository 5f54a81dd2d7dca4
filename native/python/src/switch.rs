//! Python surface of the `vswitch-switch` crate: plain tuples and dicts, made into dataclasses by
//! `vswitch/engine/native.py`.

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::{PyKeyError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use vswitch_switch::clock::Clock;
use vswitch_switch::counters::{DirectionCounters, SwitchCounters};
use vswitch_switch::drops::DropReason;
use vswitch_switch::endpoint::{Batch, Checksum, Endpoint, Meta, Offload};
use vswitch_switch::events::Event;
use vswitch_switch::fields;
use vswitch_switch::limits::Limits;
use vswitch_switch::program::{Drop, Program, TraceStep};
use vswitch_switch::queue::{self, QueuePeer};
use vswitch_switch::tap::{Sighting, Tap, TapFilter};
use vswitch_switch::upcall::Channel;
use vswitch_switch::worker::{State, Worker, WorkerGone};

/// Checksum state, IP checksum wanted, transport offset, MSS: `vswitch.endpoint.Offload` as a tuple.
type OffloadTuple = (u8, bool, u16, u32);
type FrameTuple<'py> = (Bound<'py, PyBytes>, OffloadTuple, Option<u16>, Option<u32>);
type DropTuple = (u16, String, Option<String>);
type StepTuple = (
    &'static str,
    &'static str,
    String,
    u64,
    Option<u32>,
    Option<u16>,
    Option<String>,
);

fn runtime(error: impl std::fmt::Display) -> PyErr {
    PyRuntimeError::new_err(error.to_string())
}

fn no_port(port_id: u32) -> PyErr {
    PyKeyError::new_err(format!("the switch has no port {port_id}"))
}

fn meta_of(offload: OffloadTuple, vlan_tci: Option<u16>, hash: Option<u32>) -> Meta {
    let (checksum, ip_checksum, l4_offset, mss) = offload;
    let checksum = match checksum {
        1 => Checksum::Partial,
        2 => Checksum::Good,
        _ => Checksum::None,
    };
    Meta {
        offload: Offload {
            checksum,
            ip_checksum,
            l4_offset,
            mss,
        },
        vlan_tci,
        hash,
    }
}

fn offload_tuple(offload: Offload) -> OffloadTuple {
    (
        offload.checksum as u8,
        offload.ip_checksum,
        offload.l4_offset,
        offload.mss,
    )
}

fn drop_tuple(drop: &Drop) -> DropTuple {
    (
        drop.reason.code(),
        drop.detail.to_string(),
        drop.by.as_ref().map(ToString::to_string),
    )
}

fn step_tuple(step: TraceStep) -> StepTuple {
    let reason = step.reason.map(DropReason::code);
    (
        step.stage,
        step.verdict,
        step.detail,
        step.fields,
        step.port_id,
        reason,
        step.by.map(|by| by.to_string()),
    )
}

/// A native endpoint on its way to a datapath; whoever attaches it takes it out.
#[pyclass(module = "vswitch_native.switch", frozen)]
pub struct EndpointHandle {
    endpoint: Mutex<Option<Box<dyn Endpoint>>>,
}

impl EndpointHandle {
    /// Wraps an endpoint for `Datapath.attach`.
    pub fn new(endpoint: Box<dyn Endpoint>) -> Self {
        EndpointHandle {
            endpoint: Mutex::new(Some(endpoint)),
        }
    }

    /// Takes the endpoint; `None` if it was attached before.
    pub fn take(&self) -> Option<Box<dyn Endpoint>> {
        self.endpoint
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

#[pymethods]
impl EndpointHandle {
    /// False once a datapath has taken the endpoint.
    #[getter]
    fn available(&self) -> bool {
        self.endpoint
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }
}

/// An endpoint whose other side is this Python process.
#[pyclass(module = "vswitch_native.switch", frozen)]
pub struct QueueEndpoint {
    peer: QueuePeer,
    handle: Py<EndpointHandle>,
}

#[pymethods]
impl QueueEndpoint {
    #[new]
    fn new(py: Python<'_>, limit: usize) -> PyResult<Self> {
        let (peer, endpoint) = queue::pair(limit)?;
        Ok(QueueEndpoint {
            peer,
            handle: Py::new(py, EndpointHandle::new(Box::new(endpoint)))?,
        })
    }

    /// Readable while frames from the switch wait.
    #[getter]
    fn fd(&self) -> RawFd {
        self.peer.fd()
    }

    /// What `Datapath.attach` takes.
    fn handle(&self, py: Python<'_>) -> Py<EndpointHandle> {
        self.handle.clone_ref(py)
    }

    #[pyo3(signature = (data, offload = (0, false, 0, 0), vlan_tci = None, hash = None))]
    fn send(
        &self,
        data: &[u8],
        offload: OffloadTuple,
        vlan_tci: Option<u16>,
        hash: Option<u32>,
    ) -> bool {
        self.peer
            .send(data.to_vec(), meta_of(offload, vlan_tci, hash))
    }

    fn received<'py>(&self, py: Python<'py>) -> Vec<FrameTuple<'py>> {
        let frames = self.peer.received().into_iter();
        frames
            .map(|(data, meta)| {
                (
                    PyBytes::new(py, &data),
                    offload_tuple(meta.offload),
                    meta.vlan_tci,
                    meta.hash,
                )
            })
            .collect()
    }
}

/// A capture tap.
#[pyclass(module = "vswitch_native.switch", frozen)]
pub struct CaptureTap {
    tap: Arc<Tap>,
}

type SightingTuple<'py> = (
    u64,
    u32,
    bool,
    u64,
    Bound<'py, PyBytes>,
    usize,
    Option<u16>,
    OffloadTuple,
    Option<(u16, Option<String>, String)>,
);

fn sighting_tuple(py: Python<'_>, one: Sighting) -> SightingTuple<'_> {
    let drop = one
        .drop
        .map(|(reason, by, detail)| (reason.code(), by.map(|by| by.to_string()), detail));
    (
        one.timestamp_ns,
        one.port_id,
        one.outward,
        one.packet_id,
        PyBytes::new(py, &one.data),
        one.original_length,
        one.meta.vlan_tci,
        offload_tuple(one.meta.offload),
        drop,
    )
}

#[pymethods]
impl CaptureTap {
    #[getter]
    fn fd(&self) -> RawFd {
        self.tap.fd()
    }

    #[getter]
    fn lost(&self) -> u64 {
        self.tap.lost()
    }

    fn read<'py>(&self, py: Python<'py>, limit: usize) -> Vec<SightingTuple<'py>> {
        self.tap
            .read(limit)
            .into_iter()
            .map(|one| sighting_tuple(py, one))
            .collect()
    }

    fn close(&self) {
        self.tap.close();
    }
}

/// One datapath with its worker thread.
#[pyclass(module = "vswitch_native.switch", frozen)]
pub struct Datapath {
    worker: Worker,
    limits: Limits,
}

impl Datapath {
    /// Runs `action` on the worker with the GIL released.
    fn call<R: Send + 'static>(
        &self,
        py: Python<'_>,
        action: impl FnOnce(&mut State) -> R + Send + 'static,
    ) -> PyResult<R> {
        let worker = &self.worker;
        py.detach(move || worker.call(action))
            .map_err(|gone: WorkerGone| runtime(gone))
    }

    fn quiesce(&self, py: Python<'_>) -> PyResult<()> {
        let worker = &self.worker;
        if py.detach(move || worker.quiesce()) {
            return Ok(());
        }
        Err(runtime(
            "the datapath's worker did not reach a quiescent point within 5 s",
        ))
    }
}

fn direction(py: Python<'_>, counters: &DirectionCounters) -> PyResult<Py<PyDict>> {
    let out = PyDict::new(py);
    out.set_item("packets", counters.packets)?;
    out.set_item("bytes", counters.bytes)?;
    out.set_item("unicast", counters.unicast)?;
    out.set_item("multicast", counters.multicast)?;
    out.set_item("broadcast", counters.broadcast)?;
    out.set_item("dropped", counters.dropped)?;
    out.set_item("extension_dropped", counters.extension_dropped)?;
    out.set_item("drops", counters.drops.nonzero())?;
    Ok(out.unbind())
}

fn switch_dict(py: Python<'_>, counters: &SwitchCounters) -> PyResult<Py<PyDict>> {
    let out = PyDict::new(py);
    for (name, value) in [
        ("flooded", counters.flooded),
        ("macs_learned", counters.macs_learned),
        ("macs_moved", counters.macs_moved),
        ("macs_purged", counters.macs_purged),
        ("macs_refused", counters.macs_refused),
        ("flow_hits", counters.flow_hits),
        ("flow_misses", counters.flow_misses),
        ("flows_published", counters.flows_published),
        ("flows_evicted", counters.flows_evicted),
        ("flows_refused", counters.flows_refused),
        ("upcalls", counters.upcalls),
        ("upcall_failures", counters.upcall_failures),
        ("endpoints_failed", counters.endpoints_failed),
    ] {
        out.set_item(name, value)?;
    }
    out.set_item("drops", counters.drops.nonzero())?;
    Ok(out.unbind())
}

type ProgramTuple = (Option<DropTuple>, Vec<(u32, Option<DropTuple>)>);
type FlowTuple = (u64, Vec<u128>, ProgramTuple, u64, u64, u64, Option<u64>);

fn program_tuple(program: &Program) -> ProgramTuple {
    let destinations = program.destinations.iter();
    (
        program.drop.as_ref().map(drop_tuple),
        destinations
            .map(|one| (one.port_id, one.drop.as_ref().map(drop_tuple)))
            .collect(),
    )
}

#[pymethods]
impl Datapath {
    /// `limits` in the order of `vswitch.engine.Limits`, times in nanoseconds.
    #[new]
    fn new(limits: [u64; 11], manual_time: bool) -> PyResult<Self> {
        let size = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
        let limits = Limits {
            mac_entries: size(limits[0]),
            mac_age_ns: limits[1],
            flow_entries: size(limits[2]),
            flow_masks: size(limits[3]),
            flow_idle_ns: limits[4],
            held_per_flow: size(limits[5]),
            held_total: size(limits[6]),
            upcalls_per_port: size(limits[7]),
            upcall_deadline_ns: limits[8],
            capture_frames: size(limits[9]),
            capture_bytes: size(limits[10]),
        };
        let clock = if manual_time {
            Clock::manual()
        } else {
            Clock::system()
        };
        Ok(Datapath {
            worker: Worker::start(limits, clock)?,
            limits,
        })
    }

    /// Readable while `events` has something.
    #[getter]
    fn event_fd(&self) -> RawFd {
        self.worker.events.fd()
    }

    fn add_port(&self, py: Python<'_>, port_id: u32, name: String, mtu: usize) -> PyResult<()> {
        self.call(py, move |state| state.core.add_port(port_id, name, mtu))?
            .map_err(PyValueError::new_err)
    }

    fn remove_port(&self, py: Python<'_>, port_id: u32) -> PyResult<()> {
        let existed = self.call(py, move |state| {
            let existed = state.core.port_state(port_id).is_some();
            state.remove_port(port_id);
            existed
        })?;
        self.quiesce(py)?;
        existed.then_some(()).ok_or_else(|| no_port(port_id))
    }

    fn attach(&self, py: Python<'_>, port_id: u32, handle: &EndpointHandle) -> PyResult<()> {
        match self.call(py, move |state| state.core.port_state(port_id))? {
            None => return Err(no_port(port_id)),
            Some(true) => {
                let text = format!("port {port_id} has an endpoint already; detach it first");
                return Err(PyValueError::new_err(text));
            }
            Some(false) => {}
        }
        let endpoint = handle
            .take()
            .ok_or_else(|| PyValueError::new_err("the endpoint was attached before"))?;
        self.call(py, move |state| state.attach(port_id, endpoint))?
            .map_err(|error| PyValueError::new_err(format!("port {port_id}: {error}")))
    }

    /// On return the endpoint was dropped and the worker has passed a quiescent point.
    fn detach(&self, py: Python<'_>, port_id: u32) -> PyResult<()> {
        let existed = self.call(py, move |state| {
            let existed = state.core.port_state(port_id).is_some();
            state.detach(port_id);
            existed
        })?;
        self.quiesce(py)?;
        existed.then_some(()).ok_or_else(|| no_port(port_id))
    }

    fn port_counters(&self, py: Python<'_>, port_id: u32) -> PyResult<(Py<PyDict>, Py<PyDict>)> {
        let counters = self.call(py, move |state| state.core.port_counters(port_id))?;
        let counters = counters.ok_or_else(|| no_port(port_id))?;
        Ok((direction(py, &counters.rx)?, direction(py, &counters.tx)?))
    }

    fn switch_counters(&self, py: Python<'_>) -> PyResult<Py<PyDict>> {
        let counters = self.call(py, |state| state.core.switch_counters())?;
        switch_dict(py, &counters)
    }

    /// Id, upcalls, allowed, dropped, errors, failed, why; in the order of the extensions.
    #[allow(clippy::type_complexity)]
    fn extension_counters(
        &self,
        py: Python<'_>,
    ) -> PyResult<Vec<(u64, u64, u64, u64, u64, bool, String)>> {
        let rows = self.call(py, |state| {
            let links = state.core.links();
            links
                .map(|link| (link.channel.id, link.counters.clone()))
                .collect::<Vec<_>>()
        })?;
        let rows = rows.into_iter();
        Ok(rows
            .map(|(id, c)| {
                (
                    id, c.upcalls, c.allowed, c.dropped, c.errors, c.failed, c.why,
                )
            })
            .collect())
    }

    /// VLAN id, address, port id, age in nanoseconds.
    fn mac_table(&self, py: Python<'_>) -> PyResult<Vec<(u16, u64, u32, u64)>> {
        self.call(py, |state| {
            let now_ns = state.core.clock().now_ns();
            let rows = state.core.macs().rows().into_iter();
            rows.map(|(key, row)| {
                let age_ns = now_ns.saturating_sub(row.seen_ns);
                (
                    (key >> 48) as u16,
                    key & 0xFFFF_FFFF_FFFF,
                    row.port_id,
                    age_ns,
                )
            })
            .collect()
        })
    }

    /// Mask, values of the fields in it, program, packets, bytes, idle and left time in nanoseconds.
    fn flows(&self, py: Python<'_>) -> PyResult<Vec<FlowTuple>> {
        self.call(py, |state| {
            let now_ns = state.core.clock().now_ns();
            let entries = state.core.flows().entries();
            entries
                .map(|entry| {
                    let numbers = (0..fields::COUNT).filter(|number| entry.mask & 1 << number != 0);
                    let values = numbers.map(|number| entry.key.get(number)).collect();
                    let left_ns = entry
                        .expires_ns
                        .map(|expires| expires.saturating_sub(now_ns));
                    let idle_ns = now_ns.saturating_sub(entry.used_ns);
                    let program = program_tuple(&entry.program);
                    (
                        entry.mask,
                        values,
                        program,
                        entry.packets,
                        entry.bytes,
                        idle_ns,
                        left_ns,
                    )
                })
                .collect()
        })
    }

    fn flush_flows(&self, py: Python<'_>) -> PyResult<()> {
        self.call(py, |state| state.core.flows().flush())
    }

    /// Channels as (id, name, fail open, memfd, request fd, reply fd, ingress, egress).
    #[allow(clippy::type_complexity)]
    fn set_extensions(
        &self,
        py: Python<'_>,
        channels: Vec<(u64, String, bool, RawFd, RawFd, RawFd, bool, bool)>,
    ) -> PyResult<()> {
        let channels: Vec<Channel> = channels
            .into_iter()
            .map(
                |(id, name, fail_open, memfd, request_fd, reply_fd, ingress, egress)| Channel {
                    id,
                    name,
                    fail_open,
                    memfd,
                    request_fd,
                    reply_fd,
                    ingress,
                    egress,
                },
            )
            .collect();
        self.call(py, move |state| state.set_extensions(channels))?
            .map_err(PyValueError::new_err)?;
        self.quiesce(py)
    }

    /// False = no extension has that id.
    fn fail_extension(&self, py: Python<'_>, id: u64, why: String) -> PyResult<bool> {
        self.call(py, move |state| {
            let known = state.core.has_link(id);
            state.core.fail_link(id, &why);
            state.core.flush();
            known
        })
    }

    fn open_tap(
        &self,
        py: Python<'_>,
        ports: Option<Vec<u32>>,
        snaplen: usize,
        drops: bool,
    ) -> PyResult<CaptureTap> {
        let filter = TapFilter {
            ports: ports.map(|ports| ports.into_iter().collect()),
            snaplen,
            drops,
        };
        let tap = Arc::new(Tap::new(filter, &self.limits)?);
        let shared = tap.clone();
        self.call(py, move |state| state.core.add_tap(shared))?;
        Ok(CaptureTap { tap })
    }

    #[pyo3(signature = (port_id, data, offload = (0, false, 0, 0), vlan_tci = None, hash = None))]
    fn inject(
        &self,
        py: Python<'_>,
        port_id: u32,
        data: &[u8],
        offload: OffloadTuple,
        vlan_tci: Option<u16>,
        hash: Option<u32>,
    ) -> PyResult<()> {
        let (data, meta) = (data.to_vec(), meta_of(offload, vlan_tci, hash));
        let known = self.call(py, move |state| {
            let known = state.core.port_state(port_id).is_some();
            state.core.inject(port_id, &data, meta);
            known
        })?;
        known.then_some(()).ok_or_else(|| no_port(port_id))
    }

    /// The steps come as the event `("trace", id, steps)`.
    #[pyo3(signature = (id, port_id, data, offload = (0, false, 0, 0), vlan_tci = None))]
    fn trace(
        &self,
        py: Python<'_>,
        id: u64,
        port_id: u32,
        data: &[u8],
        offload: OffloadTuple,
        vlan_tci: Option<u16>,
    ) -> PyResult<()> {
        let (data, meta) = (data.to_vec(), meta_of(offload, vlan_tci, None));
        let known = self.call(py, move |state| {
            let known = state.core.port_state(port_id).is_some();
            if known {
                state.core.trace(id, port_id, &data, meta);
            }
            known
        })?;
        known.then_some(()).ok_or_else(|| no_port(port_id))
    }

    /// Done is told by the event `("barrier", id)`.
    fn barrier(&self, py: Python<'_>, id: u64) -> PyResult<()> {
        self.call(py, move |state| state.barrier(id, &mut Batch::new()))
    }

    fn advance(&self, py: Python<'_>, ns: u64) -> PyResult<()> {
        self.worker.clock.advance(ns);
        self.call(py, |state| state.core.run_timers())
    }

    /// Events as (kind, id, text, steps): `failed`, `error`, `trace`, `barrier`, `disconnected`.
    #[allow(clippy::type_complexity)]
    fn events(&self) -> Vec<(&'static str, u64, String, Vec<StepTuple>)> {
        let events = self.worker.events.take().into_iter();
        events
            .map(|event| match event {
                Event::ExtensionFailed { id, why } => ("failed", id, why, Vec::new()),
                Event::ExtensionError { id, why } => ("error", id, why, Vec::new()),
                Event::TraceDone { id, steps } => (
                    "trace",
                    id,
                    String::new(),
                    steps.into_iter().map(step_tuple).collect(),
                ),
                Event::BarrierDone { id } => ("barrier", id, String::new(), Vec::new()),
                Event::PortDisconnected { port_id, why } => {
                    ("disconnected", u64::from(port_id), why, Vec::new())
                }
            })
            .collect()
    }

    /// Ends the worker thread; endpoints still attached are dropped.
    fn close(&self, py: Python<'_>) {
        let worker = &self.worker;
        py.detach(move || worker.stop());
    }
}

/// Name and code of every drop reason.
#[pyfunction]
fn drop_reasons() -> Vec<(String, u16)> {
    DropReason::ALL
        .iter()
        .map(|reason| (format!("{reason:?}"), reason.code()))
        .collect()
}

/// Adds the `switch` submodule to `parent`.
pub fn register(parent: &Bound<'_, PyModule>) -> PyResult<()> {
    let module = PyModule::new(parent.py(), "switch")?;
    module.add_class::<EndpointHandle>()?;
    module.add_class::<QueueEndpoint>()?;
    module.add_class::<CaptureTap>()?;
    module.add_class::<Datapath>()?;
    module.add_function(wrap_pyfunction!(drop_reasons, &module)?)?;
    parent.add_submodule(&module)
}
