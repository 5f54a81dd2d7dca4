//! Python surface of the `vswitch-wire` crate: the native engine's decoders of what a guest posts, and what the tests
//! compare with the Python twin.

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyTuple};
use vswitch_wire as wire;
use vswitch_wire::{Shown, Value};

pyo3::import_exception!(vswitch_wire.errors, UnknownMessage);
pyo3::import_exception!(vswitch_wire.errors, WireError);
pyo3::import_exception!(vswitch_wire.gpadl, GpadlError);

/// Adds the `wire` submodule to `parent`.
pub fn register(parent: &Bound<'_, PyModule>) -> PyResult<()> {
    let module = PyModule::new(parent.py(), "wire")?;
    module.add_function(wrap_pyfunction!(decode_channel_message, &module)?)?;
    module.add_function(wrap_pyfunction!(recode_channel_message, &module)?)?;
    module.add_function(wrap_pyfunction!(decode_nvsp, &module)?)?;
    module.add_function(wrap_pyfunction!(recode_nvsp, &module)?)?;
    module.add_function(wrap_pyfunction!(decode_rndis, &module)?)?;
    module.add_function(wrap_pyfunction!(recode_rndis, &module)?)?;
    module.add_function(wrap_pyfunction!(split_rndis, &module)?)?;
    module.add_function(wrap_pyfunction!(decode_packet, &module)?)?;
    module.add_function(wrap_pyfunction!(recode_packet, &module)?)?;
    module.add_function(wrap_pyfunction!(decode_door, &module)?)?;
    module.add_function(wrap_pyfunction!(recode_door, &module)?)?;
    module.add_function(wrap_pyfunction!(decode_control_word, &module)?)?;
    module.add_function(wrap_pyfunction!(decode_post_message, &module)?)?;
    module.add_function(wrap_pyfunction!(constants, &module)?)?;
    module.add_class::<GpadlAssembler>()?;
    parent.add_submodule(&module)
}

fn refuse(error: wire::WireError) -> PyErr {
    match error {
        wire::WireError::Unknown { protocol, number } => {
            UnknownMessage::new_err((protocol, number))
        }
        other => WireError::new_err(other.to_string()),
    }
}

fn value<'py>(py: Python<'py>, shown: Value) -> PyResult<Bound<'py, PyAny>> {
    Ok(match shown {
        Value::None => py.None().into_bound(py),
        Value::Bool(value) => value.into_pyobject(py)?.to_owned().into_any(),
        Value::Int(value) => value.into_pyobject(py)?.into_any(),
        Value::Guid(bytes) => PyBytes::new(py, &bytes).into_any(),
        Value::Bytes(bytes) => PyBytes::new(py, &bytes).into_any(),
        Value::Text(text) => text.into_pyobject(py)?.into_any(),
        Value::List(items) => {
            let list = PyList::empty(py);
            for item in items {
                list.append(value(py, item)?)?;
            }
            list.into_any()
        }
        Value::Record(fields) => record(py, fields)?.into_any(),
    })
}

fn record<'py>(
    py: Python<'py>,
    fields: Vec<(&'static str, Value)>,
) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for (name, shown) in fields {
        dict.set_item(name, value(py, shown)?)?;
    }
    Ok(dict)
}

type Decoded<'py> = (&'static str, Bound<'py, PyDict>);

fn shown<'py>(py: Python<'py>, (name, fields): Shown) -> PyResult<Decoded<'py>> {
    Ok((name, record(py, fields)?))
}

#[pyfunction]
fn decode_channel_message<'py>(py: Python<'py>, payload: &[u8]) -> PyResult<Decoded<'py>> {
    let message = wire::vmbus::ChannelMessage::parse(payload).map_err(refuse)?;
    shown(py, message.show())
}

/// Decodes and encodes again.
#[pyfunction]
fn recode_channel_message<'py>(py: Python<'py>, payload: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
    let message = wire::vmbus::ChannelMessage::parse(payload).map_err(refuse)?;
    Ok(PyBytes::new(py, &message.encode()))
}

#[pyfunction]
#[pyo3(signature = (payload, completion = false))]
fn decode_nvsp<'py>(py: Python<'py>, payload: &[u8], completion: bool) -> PyResult<Decoded<'py>> {
    let message = wire::nvsp::NvspMessage::parse(payload, completion).map_err(refuse)?;
    shown(py, message.show())
}

/// Decodes and encodes again, padded to `size`.
#[pyfunction]
#[pyo3(signature = (payload, completion = false, size = 0))]
fn recode_nvsp<'py>(
    py: Python<'py>,
    payload: &[u8],
    completion: bool,
    size: usize,
) -> PyResult<Bound<'py, PyBytes>> {
    let message = wire::nvsp::NvspMessage::parse(payload, completion).map_err(refuse)?;
    let mut out = Vec::new();
    message.encode(&mut out, size);
    Ok(PyBytes::new(py, &out))
}

#[pyfunction]
fn decode_rndis<'py>(py: Python<'py>, data: &[u8]) -> PyResult<Decoded<'py>> {
    let message = wire::rndis::RndisMessage::parse(data).map_err(refuse)?;
    shown(py, message.show())
}

/// Decodes and encodes again.
#[pyfunction]
fn recode_rndis<'py>(py: Python<'py>, data: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
    let message = wire::rndis::RndisMessage::parse(data).map_err(refuse)?;
    Ok(PyBytes::new(py, &message.encode()))
}

/// The messages of an aggregate.
#[pyfunction]
fn split_rndis<'py>(py: Python<'py>, data: &[u8]) -> PyResult<Bound<'py, PyList>> {
    let list = PyList::empty(py);
    for message in wire::rndis::Aggregate::new(data) {
        list.append(PyBytes::new(py, message.map_err(refuse)?))?;
    }
    Ok(list)
}

fn checked_packet(data: &[u8]) -> PyResult<wire::packet::PacketRef<'_>> {
    let packet = wire::packet::PacketRef::parse(data).map_err(refuse)?;
    packet.validate().map_err(refuse)?;
    Ok(packet)
}

#[pyfunction]
fn decode_packet<'py>(py: Python<'py>, data: &[u8]) -> PyResult<Decoded<'py>> {
    use wire::packet::{VM_PKT_DATA_USING_GPA_DIRECT, VM_PKT_DATA_USING_XFER_PAGES};
    let packet = checked_packet(data)?;
    let dict = PyDict::new(py);
    dict.set_item("type", packet.kind())?;
    dict.set_item("transaction_id", packet.transaction_id())?;
    dict.set_item("completion_requested", packet.completion_requested())?;
    dict.set_item("payload", PyBytes::new(py, packet.payload))?;
    let (ranges, transfer_ranges) = (PyList::empty(py), PyList::empty(py));
    let mut set_id = 0;
    if packet.kind() == VM_PKT_DATA_USING_GPA_DIRECT {
        for range in packet.gpa_ranges().map_err(refuse)? {
            let range = range.map_err(refuse)?;
            let pfns = PyTuple::new(py, range.pfns())?;
            ranges.append((range.byte_count, range.byte_offset, pfns))?;
        }
    }
    if packet.kind() == VM_PKT_DATA_USING_XFER_PAGES {
        let (id, entries) = packet.transfer_ranges().map_err(refuse)?;
        set_id = id;
        for range in entries {
            transfer_ranges.append((range.byte_count, range.byte_offset))?;
        }
    }
    dict.set_item("ranges", ranges)?;
    dict.set_item("transfer_set_id", set_id)?;
    dict.set_item("transfer_ranges", transfer_ranges)?;
    Ok(("Packet", dict))
}

/// Decodes and encodes again.
#[pyfunction]
fn recode_packet<'py>(py: Python<'py>, data: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
    use wire::packet as format;
    let packet = checked_packet(data)?;
    let (id, completion) = (packet.transaction_id(), packet.completion_requested());
    let mut out = Vec::new();
    match packet.kind() {
        format::VM_PKT_COMP => format::encode_completion(&mut out, id, packet.payload),
        format::VM_PKT_DATA_USING_XFER_PAGES => {
            let (set_id, ranges) = packet.transfer_ranges().map_err(refuse)?;
            let ranges: Vec<_> = ranges.collect();
            format::encode_transfer_pages(&mut out, id, set_id, &ranges, packet.payload, completion)
        }
        format::VM_PKT_DATA_USING_GPA_DIRECT => {
            let mut owned = Vec::new();
            for range in packet.gpa_ranges().map_err(refuse)? {
                let range = range.map_err(refuse)?;
                owned.push((
                    range.byte_count,
                    range.byte_offset,
                    range.pfns().collect::<Vec<u64>>(),
                ));
            }
            let ranges: Vec<_> = owned
                .iter()
                .map(|(byte_count, byte_offset, pfns)| format::GpaRangeRef {
                    byte_count: *byte_count,
                    byte_offset: *byte_offset,
                    pfns,
                })
                .collect();
            format::encode_gpa_direct(&mut out, id, &ranges, packet.payload, completion)
        }
        _ => format::encode_inband(&mut out, packet.payload, id, completion),
    }
    .map_err(refuse)?;
    Ok(PyBytes::new(py, &out))
}

#[pyfunction]
fn decode_door<'py>(
    py: Python<'py>,
    frame: &[u8],
) -> PyResult<(u32, &'static str, Bound<'py, PyDict>)> {
    let (sequence, message) = wire::door::DoorMessage::parse(frame).map_err(refuse)?;
    let (name, fields) = shown(py, message.show())?;
    Ok((sequence, name, fields))
}

/// Decodes and encodes again.
#[pyfunction]
fn recode_door<'py>(py: Python<'py>, frame: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
    let (sequence, message) = wire::door::DoorMessage::parse(frame).map_err(refuse)?;
    Ok(PyBytes::new(py, &message.encode(sequence).map_err(refuse)?))
}

/// (call code, fast, variable header, nested, rep count, rep start)
#[pyfunction]
fn decode_control_word(value: u64) -> PyResult<(u16, bool, u16, bool, u16, u16)> {
    let word = wire::hypercall::ControlWord::parse(value).map_err(refuse)?;
    Ok((
        word.call_code,
        word.fast,
        word.variable_header,
        word.nested,
        word.rep_count,
        word.rep_start,
    ))
}

/// (connection id, message type, payload)
#[pyfunction]
fn decode_post_message<'py>(
    py: Python<'py>,
    data: &[u8],
) -> PyResult<(u32, u32, Bound<'py, PyBytes>)> {
    let post = wire::hypercall::PostMessage::parse(data).map_err(refuse)?;
    Ok((
        post.connection_id,
        post.message_type,
        PyBytes::new(py, post.payload),
    ))
}

type Assembled<'py> = (u32, u32, Vec<(u32, u32, Bound<'py, PyTuple>)>);

/// Collects GPADL headers and bodies of one connection.
#[pyclass(module = "vswitch_native.wire")]
struct GpadlAssembler {
    inner: wire::gpadl::GpadlAssembler,
}

fn assembled<'py>(
    py: Python<'py>,
    gpadl: Option<wire::gpadl::AssembledGpadl>,
) -> PyResult<Option<Assembled<'py>>> {
    let Some(gpadl) = gpadl else {
        return Ok(None);
    };
    let mut ranges = Vec::with_capacity(gpadl.ranges.len());
    for range in gpadl.ranges {
        let pfns = PyTuple::new(py, range.pfns)?;
        ranges.push((range.byte_count, range.byte_offset, pfns));
    }
    Ok(Some((gpadl.relid, gpadl.gpadl_id, ranges)))
}

fn refuse_gpadl(refused: wire::gpadl::GpadlError) -> PyErr {
    GpadlError::new_err((refused.relid, refused.gpadl_id, refused.error.to_string()))
}

#[pymethods]
impl GpadlAssembler {
    #[new]
    #[pyo3(signature = (*, max_in_progress = 64))]
    fn new(max_in_progress: usize) -> Self {
        Self {
            inner: wire::gpadl::GpadlAssembler::new(max_in_progress),
        }
    }

    #[getter]
    fn in_progress(&self) -> usize {
        self.inner.in_progress()
    }

    /// Starts a GPADL; gives it when this one message held all of it.
    fn header<'py>(
        &mut self,
        py: Python<'py>,
        relid: u32,
        gpadl_id: u32,
        range_bytes: u16,
        range_count: u16,
        range_data: &[u8],
    ) -> PyResult<Option<Assembled<'py>>> {
        let whole = self
            .inner
            .header(relid, gpadl_id, range_bytes, range_count, range_data)
            .map_err(refuse_gpadl)?;
        assembled(py, whole)
    }

    /// Adds a body; gives the GPADL when it is whole.
    fn body<'py>(
        &mut self,
        py: Python<'py>,
        gpadl_id: u32,
        range_data: &[u8],
    ) -> PyResult<Option<Assembled<'py>>> {
        use wire::gpadl::BodyError;
        let whole = self
            .inner
            .body(gpadl_id, range_data)
            .map_err(|error| match error {
                BodyError::Unknown => {
                    WireError::new_err(format!("GPADL_BODY: no GPADL {gpadl_id:#x} is being made"))
                }
                BodyError::Refused(refused) => refuse_gpadl(refused),
            })?;
        assembled(py, whole)
    }

    /// Forgets an unfinished GPADL; false if there was none.
    fn discard(&mut self, gpadl_id: u32) -> bool {
        self.inner.discard(gpadl_id)
    }

    /// Forgets a channel's unfinished GPADLs and gives their ids in ascending order.
    fn discard_channel(&mut self, relid: u32) -> Vec<u32> {
        self.inner.discard_channel(relid)
    }

    /// Forgets everything.
    fn clear(&mut self) {
        self.inner.clear();
    }
}

macro_rules! listed {
    ($dict:ident, $module:ident, $prefix:literal, [$($name:ident),* $(,)?]) => {
        $($dict.set_item(concat!($prefix, ".", stringify!($name)), u64::from(wire::$module::$name as u32))?;)*
    };
}

/// Every wire constant that the crate has, as "module.NAME".
#[pyfunction]
fn constants(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let dict = PyDict::new(py);
    listed!(
        dict,
        vmbus,
        "vmbus",
        [
            CHANNELMSG_OFFERCHANNEL,
            CHANNELMSG_RESCIND_CHANNELOFFER,
            CHANNELMSG_REQUESTOFFERS,
            CHANNELMSG_ALLOFFERS_DELIVERED,
            CHANNELMSG_OPENCHANNEL,
            CHANNELMSG_OPENCHANNEL_RESULT,
            CHANNELMSG_CLOSECHANNEL,
            CHANNELMSG_GPADL_HEADER,
            CHANNELMSG_GPADL_BODY,
            CHANNELMSG_GPADL_CREATED,
            CHANNELMSG_GPADL_TEARDOWN,
            CHANNELMSG_GPADL_TORNDOWN,
            CHANNELMSG_RELID_RELEASED,
            CHANNELMSG_INITIATE_CONTACT,
            CHANNELMSG_VERSION_RESPONSE,
            CHANNELMSG_UNLOAD,
            CHANNELMSG_UNLOAD_RESPONSE,
            CHANNELMSG_OPEN_RESERVED_CHANNEL,
            CHANNELMSG_CLOSE_RESERVED_CHANNEL,
            CHANNELMSG_CLOSE_RESERVED_RESPONSE,
            CHANNELMSG_TL_CONNECT_REQUEST,
            CHANNELMSG_MODIFYCHANNEL,
            CHANNELMSG_TL_CONNECT_RESULT,
            CHANNELMSG_MODIFYCHANNEL_RESPONSE,
            CHANNELMSG_MODIFY_CONNECTION,
            CHANNELMSG_MODIFY_CONNECTION_RESPONSE,
            CHANNELMSG_PAUSE,
            CHANNELMSG_PAUSE_RESPONSE,
            CHANNELMSG_RESUME,
            MAXIMUM_MESSAGE_SIZE,
            HEADER_SIZE,
            USER_DATA_SIZE,
            MAXIMUM_RELID,
            VMBUS_MESSAGE_CONNECTION_ID,
            VMBUS_MESSAGE_CONNECTION_ID_4,
            VMBUS_MESSAGE_SINT,
            VMBUS_MESSAGE_TYPE,
        ]
    );
    listed!(
        dict,
        gpadl,
        "vmbus",
        [PAGE_SIZE, GPADL_HEADER_MAX_PFNS, GPADL_BODY_MAX_PFNS]
    );
    listed!(
        dict,
        packet,
        "packet",
        [
            VM_PKT_DATA_INBAND,
            VM_PKT_DATA_USING_XFER_PAGES,
            VM_PKT_DATA_USING_GPA_DIRECT,
            VM_PKT_COMP,
            VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED,
            DESCRIPTOR_SIZE,
            RANGES_OFFSET,
            TRAILER_SIZE,
            MAXIMUM_PACKET_SIZE,
        ]
    );
    listed!(
        dict,
        nvsp,
        "nvsp",
        [
            NVSP_MSG_TYPE_INIT,
            NVSP_MSG_TYPE_INIT_COMPLETE,
            NVSP_MSG1_TYPE_SEND_NDIS_VER,
            NVSP_MSG1_TYPE_SEND_RECV_BUF,
            NVSP_MSG1_TYPE_SEND_RECV_BUF_COMPLETE,
            NVSP_MSG1_TYPE_REVOKE_RECV_BUF,
            NVSP_MSG1_TYPE_SEND_SEND_BUF,
            NVSP_MSG1_TYPE_SEND_SEND_BUF_COMPLETE,
            NVSP_MSG1_TYPE_REVOKE_SEND_BUF,
            NVSP_MSG1_TYPE_SEND_RNDIS_PKT,
            NVSP_MSG1_TYPE_SEND_RNDIS_PKT_COMPLETE,
            NVSP_MSG2_TYPE_SEND_NDIS_CONFIG,
            NVSP_MSG4_TYPE_SEND_VF_ASSOCIATION,
            NVSP_MSG4_TYPE_SWITCH_DATA_PATH,
            NVSP_MSG5_TYPE_OID_QUERY_EX,
            NVSP_MSG5_TYPE_OID_QUERY_EX_COMPLETE,
            NVSP_MSG5_TYPE_SUBCHANNEL,
            NVSP_MSG5_TYPE_SEND_INDIRECTION_TABLE,
            NVSP_STAT_NONE,
            NVSP_STAT_SUCCESS,
            NVSP_STAT_FAIL,
            NVSP_STAT_INVALID_RNDIS_PKT,
            NVSP_STAT_BUSY,
            RMC_DATA,
            RMC_CONTROL,
            NVSP_INVALID_SECTION_INDEX,
            SEND_TABLE_OFFSET,
        ]
    );
    listed!(
        dict,
        rndis,
        "rndis",
        [
            RNDIS_MSG_PACKET,
            RNDIS_MSG_INIT,
            RNDIS_MSG_INIT_C,
            RNDIS_MSG_HALT,
            RNDIS_MSG_QUERY,
            RNDIS_MSG_QUERY_C,
            RNDIS_MSG_SET,
            RNDIS_MSG_SET_C,
            RNDIS_MSG_RESET,
            RNDIS_MSG_RESET_C,
            RNDIS_MSG_INDICATE,
            RNDIS_MSG_KEEPALIVE,
            RNDIS_MSG_KEEPALIVE_C,
            HEADER_SIZE,
            PACKET_HEADER_SIZE,
            PACKET_BODY_SIZE,
            PPI_HEADER_SIZE,
            TCPIP_CHKSUM_PKTINFO,
            TCP_LARGESEND_PKTINFO,
            IEEE_8021Q_INFO,
            NBL_HASH_VALUE,
            NBL_HASH_INFO,
            RNDIS_PKTINFO_INTERNAL,
            RNDIS_PKTINFO_ID,
        ]
    );
    listed!(
        dict,
        hypercall,
        "hypercall",
        [HV_MESSAGE_PAYLOAD_BYTE_COUNT, CONNECTION_ID_MASK]
    );
    listed!(
        dict,
        door,
        "door",
        [
            DOOR_VERSION,
            HEADER_SIZE,
            MAX_FRAME,
            MAX_BODY,
            MAX_TEXT,
            MAX_REGIONS,
            MAX_VPS,
            MESSAGE_SIZE,
            SINT_COUNT,
        ]
    );
    Ok(dict)
}
