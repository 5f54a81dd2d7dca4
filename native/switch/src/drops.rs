//! Why a frame was not delivered: the Hyper-V switch's drop reasons with the codes that Pktmon prints.
//!
//! The twin of `vswitch/drops.py`, which says what each one means; a test holds the two equal.

/// One reason per drop; the discriminant is the Windows code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u16)]
pub enum DropReason {
    Unknown = 0,
    InvalidData = 1,
    InvalidPacket = 2,
    Resources = 3,
    NotReady = 4,
    Disconnected = 5,
    NotAccepted = 6,
    Busy = 7,
    Filtered = 8,
    FilteredVlan = 9,
    UnauthorizedVlan = 10,
    UnauthorizedMac = 11,
    FailedSecurityPolicy = 12,
    FailedPvlanSetting = 13,
    Qos = 14,
    Ipsec = 15,
    MacSpoofing = 16,
    DhcpGuard = 17,
    RouterGuard = 18,
    BridgeReserved = 19,
    VirtualSubnetId = 20,
    RequiredExtensionMissing = 21,
    InvalidConfig = 22,
    MtuMismatch = 23,
    NativeFwdingReq = 24,
    InvalidVlanFormat = 25,
    InvalidDestMac = 26,
    InvalidSourceMac = 27,
    InvalidFirstNbTooSmall = 28,
    Wnv = 29,
    StormLimit = 30,
    InjectedIcmp = 31,
    FailedDestinationListUpdate = 32,
    NicDisabled = 33,
    FailedPacketFilter = 34,
    SwitchDataFlowDisabled = 35,
    FilteredIsolationUntagged = 36,
    InvalidPdQueue = 37,
    LowPowerPacketFilter = 38,
    Pause = 201,
    Reset = 202,
    SendAborted = 203,
    ProtocolNotBound = 204,
    MicroportError = 401,
    VfNotReady = 402,
    MicroportNotReady = 403,
    VmbusError = 404,
    ArpGuard = 701,
    ArpLimiter = 702,
    DhcpLimiter = 703,
    BlockBroadcast = 704,
    BlockNonIp = 705,
    ArpFilter = 706,
    Ipv4Guard = 707,
    Ipv6Guard = 708,
    MacGuard = 709,
    BroadcastNoDestinations = 710,
    UnicastNoDestination = 711,
    UnicastPortNotReady = 712,
    SwitchCallbackFailed = 713,
    Icmpv6Limiter = 714,
    Intercept = 715,
    InterceptBlock = 716,
    NdpGuard = 717,
    PortBlocked = 718,
    NicSuspended = 719,
}

impl DropReason {
    /// Every reason, in the order of the codes.
    pub const ALL: &'static [DropReason] = &[
        DropReason::Unknown,
        DropReason::InvalidData,
        DropReason::InvalidPacket,
        DropReason::Resources,
        DropReason::NotReady,
        DropReason::Disconnected,
        DropReason::NotAccepted,
        DropReason::Busy,
        DropReason::Filtered,
        DropReason::FilteredVlan,
        DropReason::UnauthorizedVlan,
        DropReason::UnauthorizedMac,
        DropReason::FailedSecurityPolicy,
        DropReason::FailedPvlanSetting,
        DropReason::Qos,
        DropReason::Ipsec,
        DropReason::MacSpoofing,
        DropReason::DhcpGuard,
        DropReason::RouterGuard,
        DropReason::BridgeReserved,
        DropReason::VirtualSubnetId,
        DropReason::RequiredExtensionMissing,
        DropReason::InvalidConfig,
        DropReason::MtuMismatch,
        DropReason::NativeFwdingReq,
        DropReason::InvalidVlanFormat,
        DropReason::InvalidDestMac,
        DropReason::InvalidSourceMac,
        DropReason::InvalidFirstNbTooSmall,
        DropReason::Wnv,
        DropReason::StormLimit,
        DropReason::InjectedIcmp,
        DropReason::FailedDestinationListUpdate,
        DropReason::NicDisabled,
        DropReason::FailedPacketFilter,
        DropReason::SwitchDataFlowDisabled,
        DropReason::FilteredIsolationUntagged,
        DropReason::InvalidPdQueue,
        DropReason::LowPowerPacketFilter,
        DropReason::Pause,
        DropReason::Reset,
        DropReason::SendAborted,
        DropReason::ProtocolNotBound,
        DropReason::MicroportError,
        DropReason::VfNotReady,
        DropReason::MicroportNotReady,
        DropReason::VmbusError,
        DropReason::ArpGuard,
        DropReason::ArpLimiter,
        DropReason::DhcpLimiter,
        DropReason::BlockBroadcast,
        DropReason::BlockNonIp,
        DropReason::ArpFilter,
        DropReason::Ipv4Guard,
        DropReason::Ipv6Guard,
        DropReason::MacGuard,
        DropReason::BroadcastNoDestinations,
        DropReason::UnicastNoDestination,
        DropReason::UnicastPortNotReady,
        DropReason::SwitchCallbackFailed,
        DropReason::Icmpv6Limiter,
        DropReason::Intercept,
        DropReason::InterceptBlock,
        DropReason::NdpGuard,
        DropReason::PortBlocked,
        DropReason::NicSuspended,
    ];

    /// The Windows code.
    pub fn code(self) -> u16 {
        self as u16
    }

    /// The reason's position in [`DropReason::ALL`], for counters in an array.
    pub fn index(self) -> usize {
        let code = usize::from(self.code());
        match code {
            0..=38 => code,
            201..=204 => code - 201 + 39,
            401..=404 => code - 401 + 43,
            _ => code - 701 + 47,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn index_is_the_position_in_all() {
        for (position, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(reason.index(), position, "{reason:?}");
        }
    }
}
