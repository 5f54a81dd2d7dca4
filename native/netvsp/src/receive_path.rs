//! What decides about a frame on its way to one guest: packet filter, size, receive offloads.

use vswitch_switch::drops::DropReason;
use vswitch_switch::endpoint::FrameRef;

use crate::checksum::{is_tag, Transport, TCP};
use crate::limits::{ETHERNET_HEADER, MTU_DEFAULT};

const FILTER_DIRECTED: u32 = 0x01;
const FILTER_MULTICAST: u32 = 0x02;
const FILTER_ALL_MULTICAST: u32 = 0x04;
const FILTER_BROADCAST: u32 = 0x08;
const FILTER_PROMISCUOUS: u32 = 0x20;

const RX_IPV4: u32 = 1;
const RX_TCP4: u32 = 2;
const RX_UDP4: u32 = 4;
const RX_TCP6: u32 = 8;
const RX_UDP6: u32 = 16;
pub(crate) const RSC_IPV4: u32 = 32;
pub(crate) const RSC_IPV6: u32 = 64;
/// The guest reads "value invalid": it takes frames whose transport checksum is good and not there.
const RX_PARTIAL: u32 = 128;

const TCP_OK: u32 = 1 << 3;
const UDP_OK: u32 = 1 << 4;
const IP_OK: u32 = 1 << 5;
/// The frame is good although its transport checksum field holds the pseudo-header's sum only.
pub(crate) const VALUE_INVALID: u32 = 1 << 7;

pub(crate) const RSC_MULTIPLE: u8 = 1;
pub(crate) const RSC_FIRST: u8 = 2;
pub(crate) const RSC_LAST: u8 = 4;

/// What decides about frames towards one guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    pub(crate) filter: u32,
    pub(crate) address: [u8; 6],
    pub(crate) link: bool,
    pub(crate) mtu: usize,
    pub(crate) offload: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            filter: 0,
            address: [0; 6],
            link: true,
            mtu: MTU_DEFAULT,
            offload: 0,
        }
    }
}

impl Settings {
    /// Why the NIC does not take the frame, if it does not.
    pub(crate) fn refusal(&self, frame: &FrameRef<'_>) -> Option<DropReason> {
        if !self.link {
            return Some(DropReason::Disconnected);
        }
        if self.filter == 0 {
            return Some(DropReason::NotReady);
        }
        let Some(header) = frame.head.get(..ETHERNET_HEADER) else {
            return Some(DropReason::InvalidPacket);
        };
        if !self.passes_filter(header) {
            return Some(DropReason::FailedPacketFilter);
        }
        if frame.meta.offload.mss == 0 && frame.len() > self.largest(header) {
            return Some(DropReason::MtuMismatch);
        }
        None
    }

    /// The largest frame with such an Ethernet header: a tag does not count.
    pub(crate) fn largest(&self, header: &[u8]) -> usize {
        match header.get(12..ETHERNET_HEADER) {
            Some(kind) if is_tag(u16::from_be_bytes([kind[0], kind[1]])) => self.mtu + 4,
            _ => self.mtu,
        }
    }

    /// "Multicast" takes every group, as a NIC that announces no multicast list does.
    fn passes_filter(&self, header: &[u8]) -> bool {
        let destination = &header[..6];
        if self.filter & FILTER_PROMISCUOUS != 0 {
            true
        } else if destination == [0xFF; 6] {
            self.filter & FILTER_BROADCAST != 0
        } else if destination[0] & 1 != 0 {
            self.filter & (FILTER_MULTICAST | FILTER_ALL_MULTICAST) != 0
        } else {
            self.filter & FILTER_DIRECTED != 0 && destination == self.address
        }
    }

    /// Receive checksum information for a verified TCP or UDP frame; 0 if the guest did not enable it.
    pub(crate) fn known_good(&self, transport: &Transport) -> u32 {
        let tcp = transport.protocol == TCP;
        let needed = match (transport.ipv6, tcp) {
            (false, true) => RX_TCP4,
            (false, false) => RX_UDP4,
            (true, true) => RX_TCP6,
            (true, false) => RX_UDP6,
        };
        if self.offload & needed == 0 {
            return 0;
        }
        let mut flags = if tcp { TCP_OK } else { UDP_OK };
        if !transport.ipv6 && self.offload & RX_IPV4 != 0 {
            flags |= IP_OK;
        }
        flags
    }

    /// Whether the guest takes partial checksums; others verify by themselves, without telling.
    pub(crate) fn takes_partial(&self) -> bool {
        self.offload & RX_PARTIAL != 0
    }

    /// Whether the guest takes coalesced segments of this IP version.
    pub(crate) fn coalesces(&self, transport: &Transport) -> bool {
        self.offload & if transport.ipv6 { RSC_IPV6 } else { RSC_IPV4 } != 0
    }
}
