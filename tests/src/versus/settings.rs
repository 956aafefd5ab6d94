//! The programs that Godwit is compared with, and what they are given. Each setting is somebody's advice for some guest: which is
//! best is found out for each case.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::case::{Case, Copying, Link};

/// A program that moves machines, with settings.
#[derive(Debug, Clone)]
pub enum Mover {
    /// QEMU.
    Qemu(&'static Settings),
    /// Cloud Hypervisor, with so many connections.
    CloudHypervisor {
        /// The program, which no distribution has.
        binary: PathBuf,
        /// TCP connections.
        connections: u32,
    },
}

impl Mover {
    /// Its settings, for people and scripts.
    pub fn settings(&self) -> String {
        match self {
            Self::Qemu(settings) => settings.name.to_owned(),
            Self::CloudHypervisor { connections, .. } => format!("connections-{connections}"),
        }
    }

    /// Whether it can do what the case asks for. Cloud Hypervisor knows no cap, and no way from pre-copy to post-copy.
    pub fn can(&self, case: &Case) -> bool {
        match self {
            Self::Qemu(settings) => settings.copy == case.copy,
            Self::CloudHypervisor { .. } => case.link != Link::Capped && case.copy == Copying::Pre,
        }
    }
}

/// Room for every working set here, which QEMU's default (64 MiB) is not.
const XBZRLE_CACHE_BYTES: u64 = 512 << 20;

/// More than any link takes. QEMU's own default is 128 MiB/s.
const UNCAPPED_BYTES_PER_S: u64 = 1_000_000_000_000;

/// A way to set QEMU up for a move.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// For people and scripts.
    pub name: &'static str,
    /// What it is for.
    copy: Copying,
    /// Migration capabilities, at both ends.
    capabilities: &'static [&'static str],
    /// Migration parameters besides bandwidth and downtime, at both ends.
    parameters: fn() -> Value,
}

impl Settings {
    /// For `migrate-set-capabilities`.
    pub fn capabilities(&self) -> Value {
        let on = |capability| json!({ "capability": capability, "state": true });
        json!({ "capabilities": self.capabilities.iter().map(on).collect::<Vec<_>>() })
    }

    /// For `migrate-set-parameters`.
    pub fn parameters(&self, cap_bytes_per_s: Option<u64>, downtime_limit_ms: u64) -> Value {
        let mut parameters = (self.parameters)();
        parameters["max-bandwidth"] = json!(cap_bytes_per_s.unwrap_or(UNCAPPED_BYTES_PER_S));
        // 0: none.
        parameters["max-postcopy-bandwidth"] = json!(cap_bytes_per_s.unwrap_or(0));
        parameters["downtime-limit"] = json!(downtime_limit_ms);
        parameters
    }
}

/// All that are tried.
pub const ALL: [Settings; 6] = [
    Settings { name: "plain", copy: Copying::Pre, capabilities: &[], parameters: || json!({}) },
    Settings {
        name: "multifd-2",
        copy: Copying::Pre,
        capabilities: &["multifd"],
        parameters: || json!({ "multifd-channels": 2 }),
    },
    Settings {
        name: "multifd-2-zstd",
        copy: Copying::Pre,
        capabilities: &["multifd"],
        parameters: || json!({ "multifd-channels": 2, "multifd-compression": "zstd" }),
    },
    Settings {
        name: "xbzrle-512m",
        copy: Copying::Pre,
        capabilities: &["xbzrle"],
        parameters: || json!({ "xbzrle-cache-size": XBZRLE_CACHE_BYTES }),
    },
    Settings { name: "auto-converge", copy: Copying::Pre, capabilities: &["auto-converge"], parameters: || json!({}) },
    Settings { name: "postcopy", copy: Copying::Post, capabilities: &["postcopy-ram"], parameters: || json!({}) },
];
