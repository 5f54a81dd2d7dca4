//! Python surface of the `vswitch-netvsp` crate: the native data channel, and a way to drive an endpoint by hand.

use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use vswitch_netvsp::channel::{Pages, KEY_BYTES};
use vswitch_netvsp::Channel;
use vswitch_switch::drops::DropReason;
use vswitch_switch::endpoint::{
    Batch, Checksum, Endpoint, FrameRef, Meta, Offload, Segment, HEAD_BYTES,
};

use crate::memory::{PyGuestMemory, PyInterrupt};
use crate::switch::EndpointHandle;

/// Adds the `netvsp` submodule to `parent`.
pub fn register(parent: &Bound<'_, PyModule>) -> PyResult<()> {
    let module = PyModule::new(parent.py(), "netvsp")?;
    module.add_class::<PyChannel>()?;
    module.add_class::<EndpointDriver>()?;
    parent.add_submodule(&module)
}

fn refuse(error: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(error.to_string())
}

type ControlTuple<'py> = (&'static str, u64, bool, Bound<'py, PyBytes>);
type TappedTuple<'py> = (u64, &'static str, Bound<'py, PyBytes>);

/// The control half of a data channel; `netvsp.channel.Channel` is its documented twin.
#[pyclass(name = "Channel", module = "vswitch_native.netvsp", frozen)]
pub struct PyChannel {
    inner: Channel,
}

#[pymethods]
impl PyChannel {
    #[new]
    fn new(
        memory: PyRef<'_, PyGuestMemory>,
        ring_pfns: Vec<u64>,
        downstream_page_offset: usize,
        doorbell_fd: RawFd,
        interrupt: PyRef<'_, PyInterrupt>,
    ) -> PyResult<Self> {
        let inner = Channel::open(
            memory.shared()?,
            &ring_pfns,
            downstream_page_offset,
            doorbell_fd,
            interrupt.shared()?,
        )
        .map_err(refuse)?;
        Ok(PyChannel { inner })
    }

    #[getter]
    fn control_fd(&self) -> RawFd {
        self.inner.shared().control_fd()
    }

    fn endpoint(&self) -> PyResult<EndpointHandle> {
        match self.inner.endpoint() {
            Some(endpoint) => Ok(EndpointHandle::new(Box::new(endpoint))),
            None => Err(PyRuntimeError::new_err(
                "the channel's endpoint was taken before",
            )),
        }
    }

    fn take_control<'py>(&self, py: Python<'py>) -> Vec<ControlTuple<'py>> {
        self.inner
            .shared()
            .take_control()
            .into_iter()
            .map(|packet| {
                (
                    packet.kind.name(),
                    packet.transaction_id,
                    packet.completion_requested,
                    PyBytes::new(py, &packet.payload),
                )
            })
            .collect()
    }

    fn fault(&self) -> Option<String> {
        self.inner.shared().fault()
    }

    fn send_inband(&self, payload: Vec<u8>, transaction_id: u64, completion_requested: bool) {
        self.inner
            .send_inband(payload, transaction_id, completion_requested);
    }

    fn send_completion(&self, transaction_id: u64, payload: Vec<u8>) {
        self.inner.send_completion(transaction_id, payload);
    }

    fn send_rndis(&self, message: Vec<u8>) {
        self.inner.send_rndis(message);
    }

    fn set_receive_buffer(
        &self,
        pfns: Vec<u64>,
        byte_offset: usize,
        byte_count: usize,
        buffer_id: u16,
        size: usize,
        count: usize,
    ) -> PyResult<()> {
        let pages = Pages {
            pfns: &pfns,
            byte_offset,
            byte_count,
        };
        self.inner
            .set_receive_buffer(pages, buffer_id, size, count)
            .map_err(refuse)
    }

    fn set_send_buffer(
        &self,
        pfns: Vec<u64>,
        byte_offset: usize,
        byte_count: usize,
        section_size: usize,
    ) -> PyResult<()> {
        let pages = Pages {
            pfns: &pfns,
            byte_offset,
            byte_count,
        };
        self.inner
            .set_send_buffer(pages, section_size)
            .map_err(refuse)
    }

    fn revoke_receive_buffer(&self) {
        self.inner.revoke_receive_buffer();
    }

    fn revoke_send_buffer(&self) {
        self.inner.revoke_send_buffer();
    }

    fn set_data(&self, enabled: bool) {
        self.inner.set_data(enabled);
    }

    fn set_link(&self, up: bool) {
        self.inner.set_link(up);
    }

    fn set_filter(&self, bits: u32, address: [u8; 6]) {
        self.inner.set_filter(bits, address);
    }

    fn set_offload(&self, bits: u32) {
        self.inner.set_offload(bits);
    }

    fn set_mtu(&self, mtu: usize) {
        self.inner.set_mtu(mtu);
    }

    fn set_rss(&self, key: Vec<u8>, table: Vec<u32>, types: u32) -> PyResult<()> {
        if table.is_empty() {
            self.inner.set_rss(&[0; KEY_BYTES], table, types);
            return Ok(());
        }
        let key = <[u8; KEY_BYTES]>::try_from(key)
            .map_err(|key| PyValueError::new_err(format!("RSS key of {} bytes", key.len())))?;
        self.inner.set_rss(&key, table, types);
        Ok(())
    }

    fn open_queue(
        &self,
        index: usize,
        ring_pfns: Vec<u64>,
        downstream_page_offset: usize,
        interrupt: PyRef<'_, PyInterrupt>,
    ) -> PyResult<()> {
        self.inner
            .open_queue(
                index,
                &ring_pfns,
                downstream_page_offset,
                interrupt.shared()?,
            )
            .map_err(refuse)
    }

    fn close_queue(&self, index: usize) {
        self.inner.close_queue(index);
    }

    fn queue_stats<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let queues = self.inner.shared().queue_stats();
        let dicts = queues.into_iter().map(|counters| {
            let stats = PyDict::new(py);
            for (name, count) in counters {
                stats.set_item(name, count)?;
            }
            Ok(stats)
        });
        dicts.collect()
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = PyDict::new(py);
        for (name, count) in self.inner.shared().stats() {
            stats.set_item(name, count)?;
        }
        Ok(stats)
    }

    fn drops<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let drops = PyDict::new(py);
        for (reason, count) in self.inner.shared().drops() {
            drops.set_item(reason, count)?;
        }
        Ok(drops)
    }

    fn tap(&self, on: bool) {
        self.inner.shared().tap(on);
    }

    fn take_tapped<'py>(&self, py: Python<'py>) -> Vec<TappedTuple<'py>> {
        self.inner
            .shared()
            .take_tapped()
            .into_iter()
            .map(|tapped| {
                (
                    tapped.timestamp_ns,
                    if tapped.from_guest { "in" } else { "out" },
                    PyBytes::new(py, &tapped.packet),
                )
            })
            .collect()
    }

    fn close(&self) {
        self.inner.close();
    }
}

struct Driven {
    endpoint: Option<Box<dyn Endpoint>>,
    batch: Batch,
}

/// A native endpoint with the Python engine's interface: what a native NIC needs on a switch that runs in Python.
#[pyclass(module = "vswitch_native.netvsp", frozen)]
pub struct EndpointDriver {
    driven: Mutex<Driven>,
    wake_fd: RawFd,
}

impl EndpointDriver {
    fn driven(&self) -> MutexGuard<'_, Driven> {
        self.driven.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn python_frame<'py>(py: Python<'py>, frame: &FrameRef<'_>) -> PyResult<Bound<'py, PyAny>> {
    let module = py.import("vswitch.endpoint")?;
    let offload = frame.meta.offload;
    let kind = module
        .getattr("Checksum")?
        .call1((offload.checksum as u8,))?;
    let arguments = (kind, offload.ip_checksum, offload.l4_offset, offload.mss);
    let offload = module.getattr("Offload")?.call1(arguments)?;
    let data = PyBytes::new(py, &frame.to_vec(usize::MAX));
    let arguments = (data, offload, frame.meta.vlan_tci, frame.meta.hash);
    module.getattr("Frame")?.call1(arguments)
}

fn native_meta(frame: &Bound<'_, PyAny>) -> PyResult<Meta> {
    let offload = frame.getattr("offload")?;
    let checksum = match offload.getattr("checksum")?.extract::<u8>()? {
        0 => Checksum::None,
        1 => Checksum::Partial,
        _ => Checksum::Good,
    };
    Ok(Meta {
        offload: Offload {
            checksum,
            ip_checksum: offload.getattr("ip_checksum")?.extract()?,
            l4_offset: offload.getattr("l4_offset")?.extract()?,
            mss: offload.getattr("mss")?.extract()?,
        },
        vlan_tci: frame.getattr("vlan_tci")?.extract()?,
        hash: frame.getattr("hash")?.extract()?,
    })
}

#[pymethods]
impl EndpointDriver {
    /// Takes the endpoint out of its handle. Raises ValueError if a datapath has it.
    #[new]
    fn new(handle: PyRef<'_, EndpointHandle>) -> PyResult<Self> {
        let endpoint = handle
            .take()
            .ok_or_else(|| PyValueError::new_err("the endpoint is attached already"))?;
        Ok(EndpointDriver {
            wake_fd: endpoint.wake_fd(),
            driven: Mutex::new(Driven {
                endpoint: Some(endpoint),
                batch: Batch::new(),
            }),
        })
    }

    #[getter]
    fn wake_fd(&self) -> RawFd {
        self.wake_fd
    }

    /// Frames from the guest, at most 64 whatever `limit` says.
    fn receive<'py>(&self, py: Python<'py>, limit: usize) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let mut driven = self.driven();
        let Driven { endpoint, batch } = &mut *driven;
        if limit == 0 {
            return Ok(Vec::new());
        }
        if let Some(endpoint) = endpoint {
            // Drops of a turn without frames stay in the batch until `take_drops`.
            let told: Vec<DropReason> = batch.dropped().to_vec();
            batch.clear();
            for reason in told {
                batch.drop_one(reason);
            }
            endpoint.receive(batch);
            let frames = (0..batch.len()).filter_map(|index| batch.frame(index));
            return frames.map(|frame| python_frame(py, &frame)).collect();
        }
        Ok(Vec::new())
    }

    /// Drops on the way in since the last call, by code.
    fn take_drops<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let mut driven = self.driven();
        let reason = py.import("vswitch.drops")?.getattr("DropReason")?;
        let drops = PyDict::new(py);
        for dropped in driven.batch.dropped() {
            let key = reason.call1((*dropped as u16,))?;
            let count = match drops.get_item(&key)? {
                Some(count) => count.extract::<u64>()?,
                None => 0,
            };
            drops.set_item(key, count + 1)?;
        }
        driven.batch.clear();
        Ok(drops)
    }

    /// None, or the code of the reason for which the frame was not taken.
    fn transmit<'py>(
        &self,
        py: Python<'py>,
        frame: &Bound<'py, PyAny>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let data: Vec<u8> = frame.getattr("data")?.extract()?;
        let meta = native_meta(frame)?;
        let (head, tail) = data.split_at(data.len().min(HEAD_BYTES));
        // SAFETY: `data` lives until this call returns, and `transmit` copies what it takes.
        let tail = [unsafe { Segment::new(tail.as_ptr(), tail.len()) }];
        let frame = FrameRef {
            head,
            tail: if data.len() > HEAD_BYTES { &tail } else { &[] },
            length: data.len(),
            meta,
        };
        let outcome = match &mut self.driven().endpoint {
            Some(endpoint) => endpoint.transmit(&frame),
            None => Err(DropReason::VmbusError),
        };
        match outcome {
            Ok(()) => Ok(None),
            Err(reason) => {
                let kind = py.import("vswitch.drops")?.getattr("DropReason")?;
                Ok(Some(kind.call1((reason as u16,))?))
            }
        }
    }

    fn flush(&self) {
        if let Some(endpoint) = &mut self.driven().endpoint {
            endpoint.flush();
        }
    }

    fn rearm(&self) -> bool {
        match &mut self.driven().endpoint {
            Some(endpoint) => endpoint.rearm(),
            None => false,
        }
    }

    /// Lets go of the endpoint and of the guest memory behind it.
    fn drop(&self) {
        self.driven().endpoint = None;
    }
}
