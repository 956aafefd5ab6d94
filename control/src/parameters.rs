//! The knobs of a move under the names that QMP has for them.
//!
//! What QEMU has too goes by QEMU's name and unit; Godwit's own begin with `x-godwit-`. [`Settings`] outlive a move:
//! `migrate-set-parameters` changes them for all later moves, and a running one's cap and downtime limit at once.

use std::time::Duration;

use godwit_core::source::{Compression, MAX_CHANNELS, MemoryHandover, OnStall, SourceMigration, SourceOptions};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::console::host_name;

/// The longest time that any knob takes.
const MAX_MS: u64 = 30 * 24 * 3600 * 1000;

/// What a machine's moves are done with unless a move says otherwise.
#[derive(Debug, Clone)]
pub struct Settings {
    /// For the engine. Its number of channels counts only with `multifd`.
    pub options: SourceOptions,
    /// Several data channels.
    pub multifd: bool,
    /// Clear text off loopback is allowed.
    pub insecure: bool,
    /// Pages are sent without being copied, where the kernel can.
    pub zero_copy: bool,
}

impl Default for Settings {
    fn default() -> Self {
        let options = SourceOptions { host_name: host_name(), ..SourceOptions::default() };
        Settings { multifd: options.channels > 1, options, insecure: false, zero_copy: false }
    }
}

impl Settings {
    /// The engine's options.
    pub fn source_options(&self) -> SourceOptions {
        let channels = if self.multifd { self.options.channels } else { 1 };
        SourceOptions { channels, ..self.options.clone() }
    }

    /// The transport's options.
    pub fn transport(&self) -> godwit_transport::Options {
        godwit_transport::Options { insecure: self.insecure, zero_copy: self.zero_copy }
    }

    /// Takes over what `parameters` give, all or nothing.
    pub fn apply(&mut self, parameters: &Parameters) -> Result<(), ParameterError> {
        let mut options = self.options.clone();
        if let Some(bytes_per_s) = parameters.max_bandwidth {
            options.max_bandwidth_bytes_per_s = none_if_zero(bytes_per_s);
        }
        if let Some(bytes_per_s) = parameters.avail_switchover_bandwidth {
            options.switchover_bandwidth_bytes_per_s = none_if_zero(bytes_per_s);
        }
        if let Some(ms) = parameters.downtime_limit {
            options.downtime_limit = time("downtime-limit", ms)?;
        }
        if let Some(channels) = parameters.multifd_channels {
            if !(1..=MAX_CHANNELS).contains(&channels) {
                return Err(ParameterError::Range {
                    name: "multifd-channels",
                    range: "1 to 64",
                    given: channels.into(),
                });
            }
            options.channels = channels;
        }
        if let Some(compression) = parameters.compression()? {
            options.compression = compression;
        }
        if let Some(name) = &parameters.memory_handover {
            options.memory_handover = parse_memory_handover(name)?;
        }
        options.delta_cache_bytes = parameters.xbzrle_cache_size.unwrap_or(options.delta_cache_bytes);
        if let Some(ms) = parameters.pause_timeout {
            options.pause_timeout = time("x-godwit-pause-timeout", ms)?;
        }
        if let Some(ms) = parameters.handover_timeout {
            options.handover_timeout = time("x-godwit-handover-timeout", ms)?;
        }
        if let Some(ms) = parameters.reconnect_timeout {
            options.reconnect_timeout = time("x-godwit-reconnect-timeout", ms)?;
        }
        if let Some(ms) = parameters.timeout {
            options.timeout = none_if_zero(ms).map(|ms| time("x-godwit-timeout", ms)).transpose()?;
        }
        if let Some(rounds) = parameters.max_rounds {
            options.max_rounds = rounds;
        }
        if let Some(name) = &parameters.on_stall {
            options.on_stall = parse_on_stall(name)?;
        }
        options.stall_detection = parameters.stall_detection.unwrap_or(options.stall_detection);
        if options.on_stall == OnStall::Throttle && !options.stall_detection {
            return Err(ParameterError::UndetectedThrottle);
        }
        options.verify = parameters.verify.unwrap_or(options.verify);
        options.audit = parameters.audit.unwrap_or(options.audit);
        self.insecure = parameters.insecure.unwrap_or(self.insecure);
        self.zero_copy = parameters.zero_copy_send.unwrap_or(self.zero_copy);
        self.options = options;
        Ok(())
    }

    /// All parameters as they stand.
    pub fn parameters(&self) -> Parameters {
        let options = &self.options;
        Parameters {
            max_bandwidth: Some(options.max_bandwidth_bytes_per_s.unwrap_or(0)),
            avail_switchover_bandwidth: Some(options.switchover_bandwidth_bytes_per_s.unwrap_or(0)),
            downtime_limit: Some(whole_ms(options.downtime_limit)),
            multifd_channels: Some(options.channels),
            multifd_compression: Some(if options.compression == Compression::None { "none" } else { "zstd" }.into()),
            multifd_zstd_level: match options.compression {
                Compression::Zstd(level) => Some(level),
                _ => None,
            },
            compress: Some(compression_name(options.compression)),
            memory_handover: Some(memory_handover_name(options.memory_handover).into()),
            xbzrle_cache_size: Some(options.delta_cache_bytes),
            pause_timeout: Some(whole_ms(options.pause_timeout)),
            handover_timeout: Some(whole_ms(options.handover_timeout)),
            reconnect_timeout: Some(whole_ms(options.reconnect_timeout)),
            timeout: Some(options.timeout.map_or(0, whole_ms)),
            max_rounds: Some(options.max_rounds),
            on_stall: Some(on_stall_name(options.on_stall).into()),
            stall_detection: Some(options.stall_detection),
            verify: Some(options.verify),
            audit: Some(options.audit),
            insecure: Some(self.insecure),
            zero_copy_send: Some(self.zero_copy),
        }
    }
}

/// `migrate-set-parameters` and what `query-migrate-parameters` answers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Parameters {
    /// Cap during the rounds, bytes per second; 0: no cap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bandwidth: Option<u64>,
    /// Bandwidth to reckon with in the pause, bytes per second; 0: measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub avail_switchover_bandwidth: Option<u64>,
    /// The longest pause to aim for, milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_limit: Option<u64>,
    /// Data channels, if the capability multifd is on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multifd_channels: Option<u16>,
    /// `none` or `zstd`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multifd_compression: Option<String>,
    /// Level of zstd.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multifd_zstd_level: Option<i32>,
    /// `auto`, `none`, `zstd` or `zstd:LEVEL`: as `--compress` has it.
    #[serde(rename = "x-godwit-compress", skip_serializing_if = "Option::is_none")]
    pub compress: Option<String>,
    /// `auto`, `require` or `off`: whether memory is handed over to a receiver on this host instead of being sent.
    #[serde(rename = "x-godwit-memory-handover", skip_serializing_if = "Option::is_none")]
    pub memory_handover: Option<String>,
    /// Memory for what was last sent of pages, in bytes, so that over a slow link only differences need be sent; 0: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub xbzrle_cache_size: Option<u64>,
    /// The longest that the pause may take before the source resumes, milliseconds.
    #[serde(rename = "x-godwit-pause-timeout", skip_serializing_if = "Option::is_none")]
    pub pause_timeout: Option<u64>,
    /// How long to wait for *running* after *commit*, milliseconds.
    #[serde(rename = "x-godwit-handover-timeout", skip_serializing_if = "Option::is_none")]
    pub handover_timeout: Option<u64>,
    /// How long a connection that breaks is made anew for, milliseconds; 0: a break ends the move.
    #[serde(rename = "x-godwit-reconnect-timeout", skip_serializing_if = "Option::is_none")]
    pub reconnect_timeout: Option<u64>,
    /// Time budget before the pause, milliseconds; 0: none.
    #[serde(rename = "x-godwit-timeout", skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u64>,
    /// Rounds after the first pass before the move counts as stalled.
    #[serde(rename = "x-godwit-max-rounds", skip_serializing_if = "Option::is_none")]
    pub max_rounds: Option<u32>,
    /// `abort`, `force`, `throttle` or `postcopy`.
    #[serde(rename = "x-godwit-on-stall", skip_serializing_if = "Option::is_none")]
    pub on_stall: Option<String>,
    /// A move counts as stalled as soon as it shows that the limits are not going to be met; `false`: only when time or rounds are used up.
    #[serde(rename = "x-godwit-stall-detection", skip_serializing_if = "Option::is_none")]
    pub stall_detection: Option<bool>,
    /// Compare page hashes before state is loaded.
    #[serde(rename = "x-godwit-verify", skip_serializing_if = "Option::is_none")]
    pub verify: Option<bool>,
    /// Hash the stopped source's memory after the handover.
    #[serde(rename = "x-godwit-audit", skip_serializing_if = "Option::is_none")]
    pub audit: Option<bool>,
    /// Send pages without copying them, where the kernel can. The same as the capability `zero-copy-send`.
    #[serde(rename = "x-godwit-zero-copy-send", skip_serializing_if = "Option::is_none")]
    pub zero_copy_send: Option<bool>,
    /// Allow clear text off loopback.
    #[serde(rename = "x-godwit-insecure", skip_serializing_if = "Option::is_none")]
    pub insecure: Option<bool>,
}

impl Parameters {
    /// Changes what can be changed in a running move; names what cannot.
    pub fn apply_in_flight(&self, migration: &SourceMigration) -> Result<(), ParameterError> {
        let changeable = Parameters {
            max_bandwidth: self.max_bandwidth,
            downtime_limit: self.downtime_limit,
            ..Parameters::default()
        };
        if *self != changeable {
            return Err(ParameterError::NotInFlight);
        }
        let limit = self.downtime_limit.map(|ms| time("downtime-limit", ms)).transpose()?;
        if let Some(bytes_per_s) = self.max_bandwidth {
            migration.set_max_bandwidth(none_if_zero(bytes_per_s));
        }
        if let Some(limit) = limit {
            migration.set_downtime_limit(limit);
        }
        Ok(())
    }

    fn compression(&self) -> Result<Option<Compression>, ParameterError> {
        if let Some(text) = &self.compress {
            return parse_compression(text).map(Some);
        }
        match (self.multifd_compression.as_deref(), self.multifd_zstd_level) {
            (Some("none"), _) => Ok(Some(Compression::None)),
            (Some("zstd"), level) => zstd(level.unwrap_or(1)).map(Some),
            (Some(other), _) => Err(ParameterError::Choice {
                name: "multifd-compression",
                choices: "none, zstd",
                given: other.to_owned(),
            }),
            (None, Some(level)) => zstd(level).map(Some),
            (None, None) => Ok(None),
        }
    }
}

/// Why a parameter cannot be set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParameterError {
    /// A number that makes no sense.
    #[error("{name} is {given}; it can be {range}")]
    Range {
        /// The parameter.
        name: &'static str,
        /// What it can be.
        range: &'static str,
        /// What was given.
        given: i64,
    },
    /// A word that is not known.
    #[error("{name} is `{given}`; it can be one of: {choices}")]
    Choice {
        /// The parameter.
        name: &'static str,
        /// What it can be.
        choices: &'static str,
        /// What was given.
        given: String,
    },
    /// A throttle is computed from what is predicted.
    #[error(
        "x-godwit-on-stall is `throttle`, which holds the guest to a rate that follows from what is predicted, and x-godwit-stall-detection is off"
    )]
    UndetectedThrottle,
    /// A move is running.
    #[error("a move is running: only max-bandwidth and downtime-limit can be changed in flight")]
    NotInFlight,
}

/// Reads `auto`, `none`, `zstd` or `zstd:LEVEL`.
pub fn parse_compression(text: &str) -> Result<Compression, ParameterError> {
    let unknown = || ParameterError::Choice {
        name: "compress",
        choices: "auto, none, zstd, zstd:LEVEL (such as zstd:3)",
        given: text.to_owned(),
    };
    match text.split_once(':') {
        None if text == "auto" => Ok(Compression::Auto),
        None if text == "none" => Ok(Compression::None),
        None if text == "zstd" => zstd(1),
        Some(("zstd", level)) => zstd(level.parse().map_err(|_| unknown())?),
        _ => Err(unknown()),
    }
}

fn zstd(level: i32) -> Result<Compression, ParameterError> {
    match level {
        -7..=19 => Ok(Compression::Zstd(level)),
        _ => Err(ParameterError::Range { name: "zstd level", range: "-7 to 19", given: level.into() }),
    }
}

fn compression_name(compression: Compression) -> String {
    match compression {
        Compression::Auto => "auto".into(),
        Compression::None => "none".into(),
        Compression::Zstd(level) => format!("zstd:{level}"),
    }
}

fn parse_on_stall(name: &str) -> Result<OnStall, ParameterError> {
    match name {
        "abort" => Ok(OnStall::Abort),
        "force" => Ok(OnStall::Force),
        "throttle" => Ok(OnStall::Throttle),
        "postcopy" => Ok(OnStall::PostCopy),
        _ => Err(ParameterError::Choice {
            name: "on-stall",
            choices: "abort, force, throttle, postcopy",
            given: name.to_owned(),
        }),
    }
}

fn on_stall_name(on_stall: OnStall) -> &'static str {
    match on_stall {
        OnStall::Abort => "abort",
        OnStall::Force => "force",
        OnStall::Throttle => "throttle",
        OnStall::PostCopy => "postcopy",
    }
}

fn parse_memory_handover(name: &str) -> Result<MemoryHandover, ParameterError> {
    match name {
        "auto" => Ok(MemoryHandover::Auto),
        "require" => Ok(MemoryHandover::Require),
        "off" => Ok(MemoryHandover::Off),
        _ => Err(ParameterError::Choice {
            name: "memory-handover",
            choices: "auto, require, off",
            given: name.to_owned(),
        }),
    }
}

fn memory_handover_name(memory_handover: MemoryHandover) -> &'static str {
    match memory_handover {
        MemoryHandover::Auto => "auto",
        MemoryHandover::Require => "require",
        MemoryHandover::Off => "off",
    }
}

fn none_if_zero(value: u64) -> Option<u64> {
    (value != 0).then_some(value)
}

fn time(name: &'static str, ms: u64) -> Result<Duration, ParameterError> {
    match ms {
        0..=MAX_MS => Ok(Duration::from_millis(ms)),
        _ => Err(ParameterError::Range { name, range: "up to 30 days", given: ms.try_into().unwrap_or(i64::MAX) }),
    }
}

fn whole_ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// A capability in `migrate-set-capabilities`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CapabilityState {
    /// Its name.
    pub capability: String,
    /// On or off.
    pub state: bool,
}

/// Capabilities of QEMU that Godwit knows and does not have.
const ABSENT_CAPABILITIES: [&str; 5] = ["xbzrle", "auto-converge", "release-ram", "block", "x-colo"];

impl Settings {
    /// Every capability and whether it is on.
    pub fn capabilities(&self) -> Value {
        let own = [
            ("events", true),
            ("return-path", true),
            // Pages that are needed have a channel of their own.
            ("postcopy-ram", true),
            ("postcopy-preempt", true),
            ("multifd", self.multifd),
            ("zero-copy-send", self.zero_copy),
            ("pause-before-switchover", self.options.pause_before_switchover),
        ];
        let absent = ABSENT_CAPABILITIES.map(|name| (name, false));
        own.into_iter().chain(absent).map(|(name, state)| json!({ "capability": name, "state": state })).collect()
    }

    /// Switches capabilities, all or nothing.
    pub fn set_capabilities(&mut self, wanted: &[CapabilityState]) -> Result<(), String> {
        let mut next = self.clone();
        for CapabilityState { capability, state } in wanted {
            match (capability.as_str(), state) {
                ("multifd", _) => next.multifd = *state,
                ("zero-copy-send", _) => next.zero_copy = *state,
                ("pause-before-switchover", _) => next.options.pause_before_switchover = *state,
                ("events" | "return-path" | "postcopy-ram" | "postcopy-preempt", true) => {}
                // Nothing goes over to it unless somebody says so.
                ("postcopy-ram" | "postcopy-preempt", false) => {}
                ("events" | "return-path", false) => return Err(format!("capability '{capability}' is always on")),
                (name, _) if !ABSENT_CAPABILITIES.contains(&name) => {
                    return Err(format!("capability '{name}' is unknown"));
                }
                (name, true) => return Err(format!("capability '{name}' is not offered by Godwit")),
                (_, false) => {}
            }
        }
        *self = next;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parameters(text: &str) -> Result<Parameters, serde_json::Error> {
        serde_json::from_str(text)
    }

    fn applied(text: &str) -> Result<SourceOptions, ParameterError> {
        let mut settings = Settings::default();
        settings.apply(&parameters(text).unwrap())?;
        Ok(settings.options)
    }

    #[test]
    fn qemus_names_and_units() {
        let options =
            applied(r#"{"max-bandwidth": 125000000, "downtime-limit": 50, "x-godwit-timeout": 9000}"#).unwrap();
        assert_eq!(options.max_bandwidth_bytes_per_s, Some(125_000_000));
        assert_eq!(options.downtime_limit, Duration::from_millis(50));
        assert_eq!(options.timeout, Some(Duration::from_secs(9)));
        assert_eq!(applied(r#"{"max-bandwidth": 0}"#).unwrap().max_bandwidth_bytes_per_s, None);
        assert_eq!(
            applied(r#"{"multifd-compression": "zstd", "multifd-zstd-level": 3}"#).unwrap().compression,
            Compression::Zstd(3)
        );
        assert!(
            parameters(r#"{"cpu-throttle-initial": 20}"#).unwrap_err().to_string().contains("cpu-throttle-initial")
        );
    }

    #[test]
    fn a_throttle_without_prediction_is_refused() {
        let text = r#"{"x-godwit-on-stall": "throttle", "x-godwit-stall-detection": false}"#;
        assert!(matches!(applied(text), Err(ParameterError::UndetectedThrottle)));
    }

    #[test]
    fn nonsense_changes_nothing() {
        let mut settings = Settings::default();
        let wrong = parameters(r#"{"max-bandwidth": 5, "multifd-channels": 0}"#).unwrap();
        assert!(matches!(settings.apply(&wrong), Err(ParameterError::Range { name: "multifd-channels", .. })));
        assert_eq!(settings.options.max_bandwidth_bytes_per_s, None);
        assert!(
            applied(r#"{"x-godwit-on-stall": "luck"}"#).unwrap_err().to_string().contains("abort, force, throttle")
        );
        assert!(applied(r#"{"x-godwit-compress": "zstd:99"}"#).is_err());
        assert!(applied(r#"{"x-godwit-compress": "lz4"}"#).is_err());
        assert!(applied(r#"{"downtime-limit": 18446744073709551615}"#).is_err());
    }

    #[test]
    fn one_channel_unless_multifd_is_on() {
        let mut settings = Settings::default();
        settings.apply(&parameters(r#"{"multifd-channels": 4}"#).unwrap()).unwrap();
        settings.set_capabilities(&[CapabilityState { capability: "multifd".into(), state: false }]).unwrap();
        assert_eq!(settings.source_options().channels, 1);
        settings.set_capabilities(&[CapabilityState { capability: "multifd".into(), state: true }]).unwrap();
        assert_eq!(settings.source_options().channels, 4);
    }

    #[test]
    fn capabilities_are_switched_all_or_none() {
        let mut settings = Settings::default();
        let state = |capability: &str, state| CapabilityState { capability: capability.into(), state };
        let wanted = [state("pause-before-switchover", true), state("frobnicate", true)];
        assert!(settings.set_capabilities(&wanted).unwrap_err().contains("'frobnicate' is unknown"));
        assert!(!settings.options.pause_before_switchover);
        settings.set_capabilities(&[state("pause-before-switchover", true), state("xbzrle", false)]).unwrap();
        assert!(settings.options.pause_before_switchover);
        assert!(settings.set_capabilities(&[state("xbzrle", true)]).is_err());
    }

    proptest! {
        #[test]
        fn what_is_answered_can_be_set(
            bandwidth: u64, limit in 0u64..1_000_000, channels in 1u16..=64, level in -7i32..=19, rounds: u32, verify: bool,
        ) {
            let mut settings = Settings::default();
            let given = Parameters {
                max_bandwidth: Some(bandwidth),
                downtime_limit: Some(limit),
                multifd_channels: Some(channels),
                multifd_zstd_level: Some(level),
                max_rounds: Some(rounds),
                verify: Some(verify),
                ..Parameters::default()
            };
            settings.apply(&given).unwrap();
            let answered: Parameters = serde_json::from_value(serde_json::to_value(settings.parameters()).unwrap()).unwrap();
            let mut copy = Settings::default();
            copy.apply(&answered).unwrap();
            prop_assert_eq!(copy.parameters(), answered);
        }
    }
}
