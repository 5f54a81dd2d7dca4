//! Internet checksums and TCP segmentation in software, as in `netvsp/checksum.py`.

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
const IPV6_EXTENSION_LIMIT: usize = 8;
const TCP_FIN_PSH: u8 = 0x09;
const TCP_CWR: u8 = 0x80;

/// Where the IP and transport headers of a frame are, in bytes from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transport {
    pub ipv6: bool,
    pub ip_offset: usize,
    pub protocol: u8,
    pub l4_offset: usize,
}

fn be16(data: &[u8], at: usize) -> Option<u16> {
    let bytes = data.get(at..at + 2)?;
    Some(u16::from_be_bytes([bytes[0], bytes[1]]))
}

fn put16(data: &mut [u8], at: usize, value: u16) {
    if let Some(field) = data.get_mut(at..at + 2) {
        field.copy_from_slice(&value.to_be_bytes());
    }
}

/// Folded one's-complement sum (not inverted) of big-endian words; an odd last byte is padded with zero.
pub fn ones_complement_sum(data: &[u8], initial: u32) -> u16 {
    // Wide words: a one's-complement sum may be taken over 32-bit words and folded at the end.
    let mut sum = u64::from(initial);
    let mut words = data.chunks_exact(4);
    for word in &mut words {
        sum += u64::from(u32::from_be_bytes([word[0], word[1], word[2], word[3]]));
    }
    let mut last = [0u8; 4];
    let rest = words.remainder();
    last[..rest.len()].copy_from_slice(rest);
    sum += u64::from(u32::from_be_bytes(last));
    while sum >> 16 != 0 {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    sum as u16
}

/// Locates the transport header of an unfragmented IPv4 or IPv6 frame.
pub fn find_transport(frame: &[u8]) -> Option<Transport> {
    let mut ethertype = be16(frame, 12)?;
    let mut ip_offset = 14;
    if is_tag(ethertype) {
        ethertype = be16(frame, 16)?;
        ip_offset = 18;
    }
    match ethertype {
        0x0800 => find_ipv4(frame, ip_offset),
        0x86DD => find_ipv6(frame, ip_offset),
        _ => None,
    }
}

/// Whether an EtherType announces an 802.1Q or 802.1ad tag in the frame.
pub fn is_tag(ethertype: u16) -> bool {
    matches!(ethertype, 0x8100 | 0x88A8)
}

fn find_ipv4(frame: &[u8], ip_offset: usize) -> Option<Transport> {
    let fixed = frame.get(ip_offset..ip_offset + 20)?;
    let header = usize::from(fixed[0] & 0x0F) * 4;
    if fixed[0] >> 4 != 4 || header < 20 || frame.len() < ip_offset + header {
        return None;
    }
    if u16::from_be_bytes([fixed[6], fixed[7]]) & 0x3FFF != 0 {
        return None;
    }
    Some(Transport {
        ipv6: false,
        ip_offset,
        protocol: fixed[9],
        l4_offset: ip_offset + header,
    })
}

fn find_ipv6(frame: &[u8], ip_offset: usize) -> Option<Transport> {
    let fixed = frame.get(ip_offset..ip_offset + 40)?;
    if fixed[0] >> 4 != 6 {
        return None;
    }
    let mut protocol = fixed[6];
    let mut offset = ip_offset + 40;
    for _ in 0..IPV6_EXTENSION_LIMIT {
        // Hop-by-hop, routing, destination options: each names its length in 8-byte units beyond the first.
        if !matches!(protocol, 0 | 43 | 60) {
            return Some(Transport {
                ipv6: true,
                ip_offset,
                protocol,
                l4_offset: offset,
            });
        }
        let extension = frame.get(offset..offset + 8)?;
        protocol = extension[0];
        offset += (usize::from(extension[1]) + 1) * 8;
    }
    None
}

impl Transport {
    /// Whether the whole fixed transport header (TCP 20, others 8 bytes) lies inside `length` bytes.
    pub fn fits(&self, length: usize) -> bool {
        let need = if self.protocol == TCP { 20 } else { 8 };
        self.l4_offset + need <= length
    }

    /// Whether the transport is TCP or UDP with its header present.
    pub fn is_tcp_or_udp(&self, length: usize) -> bool {
        matches!(self.protocol, TCP | UDP) && self.fits(length)
    }

    fn checksum_offset(&self) -> usize {
        self.l4_offset + if self.protocol == TCP { 16 } else { 6 }
    }

    /// End of the IP packet in the frame: Ethernet padding behind it is not part of any checksum.
    fn end(&self, frame: &[u8]) -> usize {
        let ip = self.ip_offset;
        let end = if self.ipv6 {
            ip + 40 + usize::from(be16(frame, ip + 4).unwrap_or(0))
        } else {
            ip + usize::from(be16(frame, ip + 2).unwrap_or(0))
        };
        if self.l4_offset < end && end <= frame.len() {
            end
        } else {
            frame.len()
        }
    }

    fn pseudo_header_sum(&self, frame: &[u8], l4_length: usize) -> u16 {
        let ip = self.ip_offset;
        let addresses = if self.ipv6 {
            frame.get(ip + 8..ip + 40)
        } else {
            frame.get(ip + 12..ip + 20)
        };
        ones_complement_sum(
            addresses.unwrap_or_default(),
            u32::from(self.protocol) + l4_length as u32,
        )
    }

    /// Computes the IPv4 header checksum in place; nothing to do for IPv6.
    pub fn fill_ipv4_header_checksum(&self, frame: &mut [u8]) {
        if self.ipv6 {
            return;
        }
        let start = self.ip_offset;
        let Some(first) = frame.get(start) else {
            return;
        };
        let end = start + usize::from(first & 0x0F) * 4;
        put16(frame, start + 10, 0);
        let sum = !ones_complement_sum(frame.get(start..end).unwrap_or_default(), 0);
        put16(frame, start + 10, sum);
    }

    /// Replaces a partial (pseudo-header) checksum by the real one, in place.
    pub fn complete_checksum(&self, frame: &mut [u8]) {
        let end = self.end(frame);
        let at = self.checksum_offset();
        put16(frame, at, 0);
        let pseudo = self.pseudo_header_sum(frame, end - self.l4_offset);
        let body = frame.get(self.l4_offset..end).unwrap_or_default();
        let mut value = !ones_complement_sum(body, u32::from(pseudo));
        if value == 0 && self.protocol == UDP {
            value = 0xFFFF;
        }
        put16(frame, at, value);
    }

    /// Makes the headers of a TCP super-frame of `length` bytes true for the whole of it: lengths, IPv4 checksum,
    /// pseudo-header sum. `head` holds at least the headers.
    pub fn make_whole(&self, head: &mut [u8], length: usize) {
        let ip = self.ip_offset;
        if self.ipv6 {
            let payload = length.saturating_sub(ip + 40).min(0xFFFF) as u16;
            put16(head, ip + 4, payload);
        } else {
            put16(head, ip + 2, (length - ip).min(0xFFFF) as u16);
            self.fill_ipv4_header_checksum(head);
        }
        let sum = self.pseudo_header_sum(head, length - self.l4_offset);
        put16(head, self.checksum_offset(), sum);
    }
}

/// A TCP super-frame to be cut into segments of at most `mss` payload bytes.
#[derive(Clone, Copy, Debug)]
pub struct Segmenter {
    transport: Transport,
    pub payload_start: usize,
    mss: usize,
    length: usize,
    sequence: u32,
    identification: u16,
}

impl Segmenter {
    /// For a frame of `length` bytes that starts with `head`. None when the TCP header does not fit in the head or `mss`
    /// is 0.
    pub fn new(head: &[u8], length: usize, transport: Transport, mss: usize) -> Option<Self> {
        let l4 = transport.l4_offset;
        if transport.protocol != TCP || !transport.fits(head.len()) || mss == 0 {
            return None;
        }
        let payload_start = l4 + usize::from(head.get(l4 + 12)? >> 4) * 4;
        if payload_start < l4 + 20 || payload_start > head.len() {
            return None;
        }
        let sequence = head.get(l4 + 4..l4 + 8)?;
        Some(Segmenter {
            transport,
            payload_start,
            mss,
            length,
            sequence: u32::from_be_bytes([sequence[0], sequence[1], sequence[2], sequence[3]]),
            identification: be16(head, transport.ip_offset + 4)?,
        })
    }

    /// How many segments there are; at least one.
    pub fn count(&self) -> usize {
        (self.length - self.payload_start).div_ceil(self.mss).max(1)
    }

    /// Bytes of the largest segment, headers included.
    pub fn largest(&self) -> usize {
        self.payload_start + (self.length - self.payload_start).min(self.mss)
    }

    /// Payload of segment `index`, as offsets in the frame.
    pub fn payload(&self, index: usize) -> std::ops::Range<usize> {
        let start = (self.payload_start + index * self.mss).min(self.length);
        start..(start + self.mss).min(self.length)
    }

    /// Makes segment `index` of `frame` in `out`: every length, IP checksum and TCP checksum rebuilt; FIN and PSH on the
    /// last only, CWR on the first only; IPv4 identification counts up.
    pub fn build(&self, frame: &[u8], index: usize, out: &mut Vec<u8>) {
        let payload = self.payload(index);
        let last = payload.end == self.length;
        let offset = payload.start - self.payload_start;
        out.clear();
        out.extend_from_slice(frame.get(..self.payload_start).unwrap_or_default());
        out.extend_from_slice(frame.get(payload).unwrap_or_default());
        let ip = self.transport.ip_offset;
        let l4 = self.transport.l4_offset;
        if self.transport.ipv6 {
            let length = out.len().saturating_sub(ip + 40) as u16;
            put16(out, ip + 4, length);
        } else {
            let length = (out.len() - ip) as u16;
            put16(out, ip + 2, length);
            put16(out, ip + 4, self.identification.wrapping_add(index as u16));
            self.transport.fill_ipv4_header_checksum(out);
        }
        let sequence = self.sequence.wrapping_add(offset as u32);
        if let Some(field) = out.get_mut(l4 + 4..l4 + 8) {
            field.copy_from_slice(&sequence.to_be_bytes());
        }
        if let Some(flags) = out.get_mut(l4 + 13) {
            if index > 0 {
                *flags &= !TCP_CWR;
            }
            if !last {
                *flags &= !TCP_FIN_PSH;
            }
        }
        self.transport.complete_checksum(out);
    }
}
