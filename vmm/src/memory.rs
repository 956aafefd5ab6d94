//! Guest RAM.

/// One region of guest RAM, for whoever looks at it from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamRegion {
    /// First guest-physical address.
    pub guest_address: u64,
    /// Length in bytes.
    pub size_bytes: u64,
    /// Where it is mapped in this process.
    pub host_address: u64,
    /// `private` or `memfd`.
    pub kind: &'static str,
}
