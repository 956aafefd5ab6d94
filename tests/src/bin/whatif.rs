//! `cargo xtask whatif`: how a move of a machine that nobody has at hand would go, by the engine's own policy and predictor, in
//! virtual time.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Parser, ValueEnum};
use godwit_control::console::out;
use godwit_control::forecast::{rounds_text, verdict_text};
use godwit_control::units::{Bandwidth, OrNone, Span, approximate_rate};
use godwit_core::PAGE_SIZE;
use godwit_core::policy::{DATA_PATH_BYTES_PER_S, Limits};
use godwit_core::predict::wan::connection_bytes_per_s;
use godwit_core::predict::{Contents, Dirtying, Encoded, Forecast, PageCost, Path, Workload, Zone};
use godwit_core::source::control::HANDOVER_TRIPS;
use godwit_core::source::{MAX_CHANNELS, OnStall};
use godwit_vmm::config::ByteSize;
use serde_json::json;

/// Pausing vCPUs and devices, saving and loading state, claiming (docs/performance.md).
const FIXED: Duration = Duration::from_millis(3);
/// One look at the dirty bits of so much memory (docs/performance.md).
const HARVEST_S_PER_BYTE: f64 = 0.02e-3 / (1u64 << 30) as f64;
/// Round trips from connecting to the first page: TCP, hello, clocks, preflight, rehearsal, data channels.
const SETUP_TRIPS: u32 = 10;
/// What a machine's setup takes beside them.
const SETUP: Duration = Duration::from_millis(50);
/// What sockets hold, whatever the delay.
const LEAST_QUEUED_BYTES: f64 = 128e3;
/// Compressible pages: what is left of one, and how many a core compresses in a second (docs/performance.md).
const COMPRESSED_BYTES: f64 = 1024.0;
const COMPRESSED_PAGES_PER_S: f64 = 0.36 * (1u64 << 30) as f64 / PAGE_SIZE as f64;
/// Hot and cold pages lie in turns all over memory.
const HOT_SPOTS: u32 = 16;

/// Predicts the move of a machine that is described by a few numbers.
#[derive(Parser)]
struct Arguments {
    /// Memory that the guest has touched
    #[arg(long, value_name = "SIZE")]
    memory: ByteSize,
    /// Of the link or the cap, whichever is lower: bytes given to sockets
    #[arg(long, value_name = "RATE")]
    bandwidth: Bandwidth,
    /// What the guest writes: pages written per second, times their size
    #[arg(long, value_name = "RATE")]
    dirty_rate: OrNone<Bandwidth>,
    /// The memory that it writes to [default: all]
    #[arg(long, value_name = "SIZE")]
    working_set: Option<ByteSize>,
    /// In which order: drawn at random, from front to back, or nine of ten writes to a tenth of the pages
    #[arg(long, value_enum, default_value = "random")]
    order: Order,
    /// The longest pause to aim for
    #[arg(long, value_name = "TIME", default_value = "300ms")]
    downtime_limit: Span,
    /// What the link takes in the pause [default: the bandwidth]
    #[arg(long, value_name = "RATE")]
    switchover_bandwidth: Option<Bandwidth>,
    /// How long a packet takes, one way
    #[arg(long, value_name = "TIME", default_value = "0ms")]
    delay: Span,
    /// Share of packets that is lost: 0.1%
    #[arg(long, value_name = "SHARE", default_value = "0%", value_parser = share)]
    loss: f64,
    /// Share of pages that compress to a quarter: 50%
    #[arg(long, value_name = "SHARE", default_value = "0%", value_parser = share)]
    compressible: f64,
    /// Data channels [default: as many as the bandwidth needs cores for]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    channels: Option<u16>,
    /// What one connection may have under way: net.ipv4.tcp_wmem's last number
    #[arg(long, value_name = "SIZE", default_value = "4M")]
    socket_buffer: ByteSize,
    /// Time budget
    #[arg(long, value_name = "TIME")]
    timeout: Option<Span>,
    /// Rounds after the first pass
    #[arg(long, value_name = "N", default_value_t = 30)]
    max_rounds: u32,
    /// One JSON object as the last line of stdout
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Order {
    Random,
    Seq,
    HotCold,
}

/// A percentage, or a number from 0 to 1.
fn share(text: &str) -> Result<f64, String> {
    let (number, whole) = text.strip_suffix('%').map_or((text, 1.0), |number| (number, 100.0));
    match number.trim().parse::<f64>() {
        Ok(number) if (0.0..=whole).contains(&number) => Ok(number / whole),
        _ => Err(format!("`{text}` is not a share: write 0.1% or 0.001")),
    }
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let working_set = arguments.working_set.unwrap_or(arguments.memory);
    if working_set > arguments.memory {
        bail!("--working-set {working_set} is more than --memory {}", arguments.memory);
    }
    let link = Link::new(arguments);
    let forecast = predicted(arguments, working_set, &link);

    out(rounds_text(&forecast.rounds));
    out("");
    if link.bytes_per_s < arguments.bandwidth.bytes_per_s as f64 {
        out(format_args!(
            "Delay and loss leave {} of the link's {}, on {} channels.",
            approximate_rate(link.bytes_per_s),
            approximate_rate(arguments.bandwidth.bytes_per_s as f64),
            link.channels
        ));
    }
    let limit_ms = arguments.downtime_limit.0.as_secs_f64() * 1e3;
    out(verdict_text(&forecast, limit_ms, arguments.bytes_dirtied_per_s()));
    if arguments.json {
        out(json!({
            "bandwidth_bytes_per_s": link.bytes_per_s,
            "channels": link.channels,
            "downtime_limit_ms": limit_ms,
            "highest_dirty_bytes_per_s": forecast.margin.map(|margin| margin * arguments.bytes_dirtied_per_s()),
            "forecast": forecast,
        }));
    }
    Ok(())
}

fn predicted(arguments: &Arguments, working_set: ByteSize, link: &Link) -> Forecast {
    let limits = Limits {
        downtime: arguments.downtime_limit.0,
        max_rounds: arguments.max_rounds,
        timeout: arguments.timeout.map(|span| span.0),
        on_stall: OnStall::Abort,
    };
    Forecast::new(&workload(arguments, working_set, link.channels), 0.0, &path(arguments, link), &limits)
}

impl Arguments {
    fn bytes_dirtied_per_s(&self) -> f64 {
        self.dirty_rate.0.map_or(0.0, |rate| rate.bytes_per_s as f64)
    }
}

/// What the link takes from this many channels.
struct Link {
    channels: u16,
    bytes_per_s: f64,
}

impl Link {
    fn new(arguments: &Arguments) -> Self {
        let bandwidth = arguments.bandwidth.bytes_per_s as f64;
        let needed = (bandwidth / DATA_PATH_BYTES_PER_S).ceil() as u16;
        let channels = arguments.channels.unwrap_or(needed.clamp(1, MAX_CHANNELS));
        let buffer = arguments.socket_buffer.bytes() as f64;
        let connection = connection_bytes_per_s(2 * arguments.delay.0, arguments.loss, buffer);
        Self { channels, bytes_per_s: bandwidth.min(connection * f64::from(channels)) }
    }
}

fn path(arguments: &Arguments, link: &Link) -> Path {
    let round_trip = 2 * arguments.delay.0;
    let harvest = Duration::from_secs_f64(arguments.memory.bytes() as f64 * HARVEST_S_PER_BYTE);
    let switchover = arguments.switchover_bandwidth.map_or(link.bytes_per_s, |rate| rate.bytes_per_s as f64);
    Path {
        bandwidth_bytes_per_s: link.bytes_per_s,
        switchover_bytes_per_s: switchover,
        setup: SETUP + round_trip * SETUP_TRIPS,
        probe_bytes: 0.0,
        round_overhead: harvest,
        fixed: FIXED + harvest + round_trip * HANDOVER_TRIPS,
        queued_bytes: (link.bytes_per_s * round_trip.as_secs_f64()).max(LEAST_QUEUED_BYTES),
    }
}

fn workload(arguments: &Arguments, working_set: ByteSize, channels: u16) -> Workload {
    let page_bytes = PAGE_SIZE as f64;
    let (memory, set) = (arguments.memory.bytes() as f64 / page_bytes, working_set.bytes() as f64 / page_bytes);
    let rate = arguments.bytes_dirtied_per_s() / page_bytes;
    let zones = match arguments.order {
        Order::Random => vec![Zone { touched_pages: memory, dirtying: Dirtying::random(rate, set) }],
        Order::Seq => vec![Zone { touched_pages: memory, dirtying: Dirtying::sequential(rate, set) }],
        Order::HotCold => {
            let spots = f64::from(HOT_SPOTS);
            let spot = [(0.9, 0.1), (0.1, 0.9)].map(|(writes, pages)| Zone {
                touched_pages: memory * pages / spots,
                dirtying: Dirtying::random(rate * writes / spots, set * pages / spots),
            });
            (0..HOT_SPOTS).flat_map(|_| spot.clone()).collect()
        }
    };
    let cores = f64::from(channels);
    let plain = PageCost { pages_per_s: PageCost::RAW.pages_per_s * cores, ..PageCost::RAW };
    let mixed = arguments.compressible * COMPRESSED_BYTES + (1.0 - arguments.compressible) * plain.wire_bytes;
    let slow = match arguments.compressible > 0.0 {
        true => PageCost { wire_bytes: mixed, pages_per_s: COMPRESSED_PAGES_PER_S * cores },
        false => plain,
    };
    let encoded = Encoded { plain, slow };
    Workload { zones, contents: Contents::always(encoded) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forecast(line: &str) -> (Forecast, Link) {
        let arguments = Arguments::try_parse_from(["whatif"].into_iter().chain(line.split(' '))).unwrap();
        let link = Link::new(&arguments);
        let forecast = predicted(&arguments, arguments.working_set.unwrap_or(arguments.memory), &link);
        (forecast, link)
    }

    #[test]
    fn an_idle_machine_takes_its_memory_once_over_the_link() {
        let (forecast, _) = forecast("--memory 1T --bandwidth 10Gbit --dirty-rate none");
        let once = (1u64 << 40) as f64 / 1.25e9;
        assert!(
            forecast.converges && (forecast.total_s.likely / once - 1.0).abs() < 0.01,
            "{}",
            forecast.total_s.likely
        );
    }

    #[test]
    fn a_random_writer_converges_up_to_the_closed_form_s_rate() {
        // ρ x* W / B_s + F = 300 ms, and k = 1 / (1 − x*).
        let (forecast, link) = forecast("--memory 64G --bandwidth 10Gbit --working-set 4G --dirty-rate 1G/s");
        let fixed = 3e-3 + 64.0 * 0.02e-3;
        let settled = (0.3 - fixed) * link.bytes_per_s / (4u64 << 30) as f64;
        let highest = link.bytes_per_s / (1.0 - settled);
        let margin = forecast.margin.unwrap() * (1u64 << 30) as f64;
        assert!((margin / highest - 1.0).abs() < 0.03, "{margin} {highest}");
    }

    #[test]
    fn delay_and_loss_bound_the_link() {
        let wan = "--memory 1G --bandwidth 10Gbit --dirty-rate none --channels 2 --delay 30ms --loss";
        let (_, clean) = forecast(&format!("{wan} 0%"));
        assert!((clean.bytes_per_s / (2.0 * (4 << 20) as f64 / 0.06) - 1.0).abs() < 1e-9, "{}", clean.bytes_per_s);
        let (_, lossy) = forecast(&format!("{wan} 0.1%"));
        assert!(lossy.bytes_per_s < clean.bytes_per_s / 10.0, "{}", lossy.bytes_per_s);
    }

    #[test]
    fn shares_are_percentages_or_numbers_up_to_1() {
        assert_eq!((share("0.1%"), share("0.5"), share("100%")), (Ok(0.001), Ok(0.5), Ok(1.0)));
        assert!(share("1.1").is_err() && share("101%").is_err() && share("-1%").is_err() && share("x").is_err());
    }
}
