//! Between a TAP's virtio-net header and RNDIS per-packet info; the twin of `netvsc/frames.py`.
//!
//! A frame is read behind headroom, so that its RNDIS header is put right before it and nothing is copied twice.

use vswitch_wire::WireError;

pub const VNET_SIZE: usize = 10;
pub const NEEDS_CSUM: u8 = 1;
pub const DATA_VALID: u8 = 2;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

const RNDIS_HEADER: usize = 44;
const PPI_SIZE: usize = 16;
const PPI_DATA: u32 = 12;
const PPI_CHECKSUM: u32 = 0;
const PPI_LSO: u32 = 2;
const PPI_8021Q: u32 = 6;
const PPI_PACKET_ID: u32 = 0x8000_0001;
const TX_IPV4: u32 = 1;
const TX_IPV6: u32 = 2;
const TX_TCP: u32 = 4;
const TX_UDP: u32 = 8;
const RX_GOOD: u32 = 1 << 3 | 1 << 4;
const RX_VALUE_INVALID: u32 = 1 << 7;
const LSO_V2: u32 = 1 << 30;
const LSO_IPV6: u32 = 1 << 31;
pub const RSC_FIRST: u8 = 2;
pub const RSC_LAST: u8 = 4;

const ETH_HEADER: usize = 14;
const TCP: u8 = 6;
const UDP: u8 = 17;
const TCP_CHECK: u16 = 16;
const UDP_CHECK: u16 = 6;

/// What a buffer must leave free before the virtio-net header of a frame that is to be transmitted.
pub const HEADROOM: usize = RNDIS_HEADER + 2 * PPI_SIZE;

fn bad<T>(what: &'static str, why: &'static str) -> Result<T, WireError> {
    Err(WireError::Bad { what, why })
}

fn get16(data: &[u8], at: usize) -> u16 {
    match data.get(at..at + 2) {
        Some(&[a, b]) => u16::from_be_bytes([a, b]),
        _ => 0,
    }
}

fn put16(data: &mut [u8], at: usize, value: u16) {
    if let Some(place) = data.get_mut(at..at + 2) {
        place.copy_from_slice(&value.to_be_bytes());
    }
}

fn le16(data: &[u8], at: usize) -> u16 {
    match data.get(at..at + 2) {
        Some(&[a, b]) => u16::from_le_bytes([a, b]),
        _ => 0,
    }
}

fn le32(data: &[u8], at: usize) -> u32 {
    match data.get(at..at + 4) {
        Some(&[a, b, c, d]) => u32::from_le_bytes([a, b, c, d]),
        _ => 0,
    }
}

fn put_le32(data: &mut [u8], at: usize, value: u32) {
    if let Some(place) = data.get_mut(at..at + 4) {
        place.copy_from_slice(&value.to_le_bytes());
    }
}

/// Ones' complement sum of big-endian 16-bit words, folded; an odd last byte is the high half of a word.
fn sum16(data: &[u8], start: u32) -> u16 {
    let mut total = u64::from(start);
    let mut words = data.chunks_exact(4);
    for word in &mut words {
        total += u64::from(u32::from_be_bytes([word[0], word[1], word[2], word[3]]));
    }
    let rest = words.remainder();
    let mut last = [0u8; 4];
    last[..rest.len()].copy_from_slice(rest);
    total += u64::from(u32::from_be_bytes(last));
    while total >> 16 != 0 {
        total = (total & 0xFFFF) + (total >> 16);
    }
    total as u16
}

fn complete_checksum(frame: &mut [u8], start: usize, offset: usize) {
    let check = !sum16(frame.get(start..).unwrap_or_default(), 0);
    put16(
        frame,
        start + offset,
        if check == 0 { 0xFFFF } else { check },
    );
}

/// Makes the RNDIS PACKET message for the frame in `buffer[HEADROOM..HEADROOM + length]` (virtio-net header first).
///
/// Returns where in `buffer` the message starts; it ends where the frame ended.
pub fn transmit(
    buffer: &mut [u8],
    length: usize,
    vlan: Option<u16>,
    checksum: bool,
) -> Result<usize, WireError> {
    const WHAT: &str = "frame from the interface";
    let end = HEADROOM + length;
    if length < VNET_SIZE + ETH_HEADER || end > buffer.len() {
        return bad(WHAT, "shorter than an Ethernet header");
    }
    let header = &buffer[HEADROOM..];
    let (flags, gso) = (header[0], header[1]);
    let mss = u32::from(le16(header, 4));
    let mut start = usize::from(le16(header, 6));
    let offset = le16(header, 8);
    let mut at = HEADROOM + VNET_SIZE;
    let mut tag = vlan;
    if get16(buffer, at + 12) == 0x8100 && end - at >= ETH_HEADER + 4 {
        tag = Some(get16(buffer, at + 14));
        buffer.copy_within(at..at + 12, at + 4);
        at += 4;
        start = start.saturating_sub(4);
    }
    let mut infos = [(0u32, 0u32); 2];
    let mut count = 0;
    if let Some(tci) = tag {
        let tci = u32::from(tci);
        infos[count] = (
            PPI_8021Q,
            tci >> 13 | (tci >> 12 & 1) << 3 | (tci & 0xFFF) << 4,
        );
        count += 1;
    }
    if flags & NEEDS_CSUM != 0 {
        let frame = &mut buffer[at..end];
        if start < ETH_HEADER || start + usize::from(offset) + 2 > frame.len() {
            return bad(WHAT, "its checksum field is outside");
        }
        let ipv6 = get16(frame, 12) == 0x86DD;
        if matches!(gso & !GSO_ECN, GSO_TCPV4 | GSO_TCPV6) && mss != 0 {
            let headers = ETH_HEADER + if ipv6 { 40 } else { 20 };
            if start < headers || start + usize::from(TCP_CHECK) + 2 > frame.len() {
                return bad(WHAT, "a large send whose TCP header is outside");
            }
            for_large_send(frame, start, ipv6);
            let version = if ipv6 { LSO_IPV6 } else { 0 };
            infos[count] = (
                PPI_LSO,
                mss & 0xF_FFFF | (start as u32 & 0x3FF) << 20 | LSO_V2 | version,
            );
            count += 1;
        } else if checksum && matches!(offset, TCP_CHECK | UDP_CHECK) && start < 0x400 {
            let family = if ipv6 { TX_IPV6 } else { TX_IPV4 };
            let protocol = if offset == TCP_CHECK { TX_TCP } else { TX_UDP };
            infos[count] = (PPI_CHECKSUM, family | protocol | (start as u32) << 16);
            count += 1;
        } else {
            complete_checksum(frame, start, usize::from(offset));
        }
    }
    let begin = at - RNDIS_HEADER - count * PPI_SIZE;
    let frame_length = (end - at) as u32;
    let info_length = (count * PPI_SIZE) as u32;
    let head = &mut buffer[begin..at];
    head.fill(0);
    put_le32(head, 0, 1);
    put_le32(head, 4, RNDIS_HEADER as u32 + info_length + frame_length);
    put_le32(head, 8, 36 + info_length);
    put_le32(head, 12, frame_length);
    put_le32(head, 28, if count > 0 { 36 } else { 0 });
    put_le32(head, 32, info_length);
    for (index, (kind, value)) in infos.iter().take(count).enumerate() {
        let place = RNDIS_HEADER + index * PPI_SIZE;
        put_le32(head, place, PPI_SIZE as u32);
        put_le32(head, place + 4, *kind);
        put_le32(head, place + 8, PPI_DATA);
        put_le32(head, place + 12, *value);
    }
    Ok(begin)
}

/// LSOv2 wants lengths of 0 and a pseudo-header sum without length: the host rebuilds them per segment.
fn for_large_send(frame: &mut [u8], start: usize, ipv6: bool) {
    let addresses = if ipv6 {
        put16(frame, ETH_HEADER + 4, 0);
        ETH_HEADER + 8..ETH_HEADER + 40
    } else {
        put16(frame, ETH_HEADER + 2, 0);
        put16(frame, ETH_HEADER + 10, 0);
        ETH_HEADER + 12..ETH_HEADER + 20
    };
    let pseudo = sum16(frame.get(addresses).unwrap_or_default(), u32::from(TCP));
    put16(frame, start + usize::from(TCP_CHECK), pseudo);
}

/// One RNDIS PACKET message from the host, checked: where its frame is and what the host said of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    pub start: usize,
    pub length: usize,
    pub checksum: u32,
    pub vlan: Option<u16>,
    pub fragment: Option<u8>,
}

/// Checks a PACKET message, as long as its range.
pub fn receive(message: &[u8]) -> Result<Received, WireError> {
    const WHAT: &str = "RNDIS packet";
    if message.len() < RNDIS_HEADER {
        return bad(WHAT, "shorter than its header");
    }
    let length = u64::from(le32(message, 4));
    if le32(message, 0) != 1 || length > message.len() as u64 {
        return bad(WHAT, "not a packet, or longer than its range");
    }
    let (offset, size) = (u64::from(le32(message, 8)), u64::from(le32(message, 12)));
    if offset < 36 || size == 0 || 8 + offset + size > length {
        return bad(WHAT, "its data does not lie inside");
    }
    let mut result = Received {
        start: 8 + offset as usize,
        length: size as usize,
        ..Received::default()
    };
    let (info_offset, info_size) = (u64::from(le32(message, 28)), u64::from(le32(message, 32)));
    if info_size != 0 {
        if info_offset < 36 || info_offset % 4 != 0 || 8 + info_offset + info_size > length {
            return bad(WHAT, "its packet info does not lie inside");
        }
        let from = 8 + info_offset as usize;
        read_infos(
            message
                .get(from..from + info_size as usize)
                .unwrap_or_default(),
            &mut result,
        )?;
    }
    if result.fragment.is_none() && result.length < ETH_HEADER {
        return bad(WHAT, "shorter than an Ethernet header");
    }
    Ok(result)
}

fn read_infos(mut infos: &[u8], result: &mut Received) -> Result<(), WireError> {
    while !infos.is_empty() {
        let size = le32(infos, 0) as usize;
        if infos.len() < PPI_SIZE
            || !size.is_multiple_of(4)
            || size < PPI_SIZE
            || size > infos.len()
        {
            return bad("RNDIS packet info", "a record does not lie inside");
        }
        let value = le32(infos, 12);
        match le32(infos, 4) {
            PPI_CHECKSUM => result.checksum = value,
            PPI_8021Q => {
                result.vlan =
                    Some(((value & 7) << 13 | (value >> 3 & 1) << 12 | value >> 4 & 0xFFF) as u16);
            }
            PPI_PACKET_ID => result.fragment = Some((value >> 8) as u8),
            _ => {}
        }
        infos = infos.get(size..).unwrap_or_default();
    }
    Ok(())
}

/// Makes `out[..VNET_SIZE]` the header for the frame behind it (one message, or a whole run), which may be changed.
pub fn finish(out: &mut Vec<u8>, checksum: u32, vlan: Option<u16>, mtu: usize) {
    let (head, frame) = out.split_at_mut(VNET_SIZE);
    head.fill(0);
    vnet_header(head, frame, checksum, mtu);
    let Some(tci) = vlan else { return };
    if head[0] & NEEDS_CSUM != 0 {
        let start = le16(head, 6) + 4;
        head[6..8].copy_from_slice(&start.to_le_bytes());
        let length = le16(head, 2);
        if length != 0 {
            head[2..4].copy_from_slice(&(length + 4).to_le_bytes());
        }
    }
    let [high, low] = tci.to_be_bytes();
    let place = VNET_SIZE + 12;
    out.splice(place..place, [0x81, 0x00, high, low]);
}

fn vnet_header(head: &mut [u8], frame: &mut [u8], checksum: u32, mtu: usize) {
    if checksum & RX_GOOD == 0 {
        return;
    }
    head[0] = DATA_VALID;
    let oversize = frame.len() > mtu + ETH_HEADER;
    if checksum & RX_VALUE_INVALID == 0 && !oversize {
        return;
    }
    let Some((start, protocol, ipv6)) = transport(frame) else {
        return;
    };
    if !oversize {
        let offset = if protocol == TCP {
            TCP_CHECK
        } else {
            UDP_CHECK
        };
        head[0] = NEEDS_CSUM;
        head[6..8].copy_from_slice(&(start as u16).to_le_bytes());
        head[8..10].copy_from_slice(&offset.to_le_bytes());
    } else if protocol == TCP {
        large_receive(head, frame, start, ipv6, mtu);
    }
}

/// A coalesced TCP run becomes one GSO frame, so that a guest that routes can cut it again.
fn large_receive(head: &mut [u8], frame: &mut [u8], start: usize, ipv6: bool, mtu: usize) {
    let header_length = start + usize::from(frame[start + 12] >> 4) * 4;
    let mss = mtu.saturating_sub(header_length - ETH_HEADER);
    let tcp_length = (frame.len() - start) as u32;
    let addresses = if ipv6 {
        put16(
            frame,
            ETH_HEADER + 4,
            (frame.len() - ETH_HEADER - 40) as u16,
        );
        ETH_HEADER + 8..ETH_HEADER + 40
    } else {
        put16(frame, ETH_HEADER + 2, (frame.len() - ETH_HEADER) as u16);
        put16(frame, ETH_HEADER + 10, 0);
        let check = !sum16(&frame[ETH_HEADER..start], 0);
        put16(frame, ETH_HEADER + 10, check);
        ETH_HEADER + 12..ETH_HEADER + 20
    };
    let pseudo = sum16(
        frame.get(addresses).unwrap_or_default(),
        u32::from(TCP) + tcp_length,
    );
    put16(frame, start + usize::from(TCP_CHECK), pseudo);
    head[0] = NEEDS_CSUM;
    head[1] = if ipv6 { GSO_TCPV6 } else { GSO_TCPV4 };
    head[2..4].copy_from_slice(&(header_length as u16).to_le_bytes());
    head[4..6].copy_from_slice(&(mss as u16).to_le_bytes());
    head[6..8].copy_from_slice(&(start as u16).to_le_bytes());
    head[8..10].copy_from_slice(&TCP_CHECK.to_le_bytes());
}

/// Where TCP or UDP starts in an unfragmented IP frame: (offset, protocol, is IPv6).
fn transport(frame: &[u8]) -> Option<(usize, u8, bool)> {
    let (start, protocol, ipv6) = match get16(frame, 12) {
        0x0800 if frame.len() >= ETH_HEADER + 20 => {
            if get16(frame, ETH_HEADER + 6) & 0x3FFF != 0 {
                return None;
            }
            let start = ETH_HEADER + usize::from(frame[ETH_HEADER] & 0xF) * 4;
            (start, frame[ETH_HEADER + 9], false)
        }
        0x86DD if frame.len() >= ETH_HEADER + 40 => (ETH_HEADER + 40, frame[ETH_HEADER + 6], true),
        _ => return None,
    };
    let need = match protocol {
        TCP => 20,
        UDP => 8,
        _ => return None,
    };
    (start >= ETH_HEADER + 20 && start + need <= frame.len()).then_some((start, protocol, ipv6))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(frame: &[u8], vnet: [u8; 10], checksum: bool) -> Vec<u8> {
        let mut buffer = vec![0; HEADROOM];
        buffer.extend_from_slice(&vnet);
        buffer.extend_from_slice(frame);
        let length = VNET_SIZE + frame.len();
        let begin = transmit(&mut buffer, length, None, checksum).unwrap();
        buffer.split_off(begin)
    }

    #[test]
    fn a_plain_frame_crosses_unchanged() {
        let frame = [7u8; 60];
        let message = message(&frame, [0; 10], true);
        let received = receive(&message).unwrap();
        assert_eq!(
            &message[received.start..received.start + received.length],
            frame
        );
        assert_eq!((received.checksum, received.vlan), (0, None));
    }

    #[test]
    fn a_tag_travels_out_of_band_and_comes_back() {
        let mut frame = vec![1u8; 12];
        frame.extend_from_slice(&[0x81, 0x00, 0xB0, 0x2A, 0x08, 0x06]);
        frame.extend_from_slice(&[5; 46]);
        let message = message(&frame, [0; 10], true);
        let received = receive(&message).unwrap();
        assert_eq!(received.vlan, Some(0xB02A));
        let mut out = vec![0; VNET_SIZE];
        out.extend_from_slice(&message[received.start..received.start + received.length]);
        finish(&mut out, 0, received.vlan, 1500);
        assert_eq!(&out[VNET_SIZE..], frame);
    }

    #[test]
    fn lying_lengths_are_refused() {
        let good = message(&[7u8; 60], [0; 10], true);
        for (at, value) in [
            (4, 4000),
            (8, 35),
            (8, 0xFFFF_FFF0),
            (12, 0),
            (12, 0xFFFF_FFFF),
            (32, 8),
        ] {
            let mut bytes = good.clone();
            put_le32(&mut bytes, at, value);
            assert!(receive(&bytes).is_err(), "{at}: {value}");
        }
        for cut in 0..good.len() {
            assert!(receive(&good[..cut]).is_err());
        }
    }

    #[test]
    fn a_checksum_outside_the_frame_is_refused() {
        let mut vnet = [0u8; 10];
        vnet[0] = NEEDS_CSUM;
        vnet[6..8].copy_from_slice(&50u16.to_le_bytes());
        vnet[8..10].copy_from_slice(&16u16.to_le_bytes());
        let mut buffer = vec![0; HEADROOM];
        buffer.extend_from_slice(&vnet);
        buffer.extend_from_slice(&[0; 60]);
        assert!(transmit(&mut buffer, 70, None, true).is_err());
    }
}
