//! What one TCP connection gets through a link with delay and loss, however fast the link.
//!
//! The average congestion window under random loss, in segments, is that of CUBIC or of Reno, whichever is larger
//! (RFC 9438, sections 4.3 and 5.1): (C(3 + β) / 4(1 − β))^¼ × (RTT / p)^¾, and √(3/2) / √p (Mathis, Semke, Mahdavi, Ott: "The Macroscopic
//! Behavior of the TCP Congestion Avoidance Algorithm", CCR 27(3), 1997). Without loss it is the socket buffer that bounds
//! what is under way.

use std::time::Duration;

/// RFC 9438, section 5.
const CUBIC_C: f64 = 0.4;
/// RFC 9438, section 4.6.
const CUBIC_BETA: f64 = 0.7;
/// Bytes of a segment in an Ethernet frame, with timestamps.
pub const SEGMENT_BYTES: f64 = 1448.0;

/// What one connection gets: `loss` is the share of packets that is lost.
pub fn connection_bytes_per_s(round_trip: Duration, loss: f64, socket_buffer_bytes: f64) -> f64 {
    let seconds = round_trip.as_secs_f64();
    if seconds <= 0.0 {
        return f64::INFINITY;
    }
    socket_buffer_bytes.min(window_segments(seconds, loss) * SEGMENT_BYTES) / seconds
}

fn window_segments(round_trip_s: f64, loss: f64) -> f64 {
    if loss <= 0.0 {
        return f64::INFINITY;
    }
    let factor = (CUBIC_C * (3.0 + CUBIC_BETA) / (4.0 * (1.0 - CUBIC_BETA))).powf(0.25);
    let cubic = factor * (round_trip_s / loss).powf(0.75);
    let reno = (1.5f64 / loss).sqrt();
    cubic.max(reno)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_published_windows() {
        // RFC 9438, table 1 (RTT 0.1 s): at 1e-6 Reno 1,200 segments, CUBIC 12,187 with C = 0.04 × 10.
        assert!((window_segments(0.1, 1e-2) - 12.25).abs() < 0.3);
        let long = window_segments(0.1, 1e-6);
        assert!((long / (1.0537 * 0.1f64.powf(0.75) * 1e6f64.powf(0.75)) - 1.0).abs() < 1e-3, "{long}");
    }

    #[test]
    fn without_loss_the_buffer_bounds_and_without_delay_nothing() {
        let ms = Duration::from_millis;
        assert_eq!(connection_bytes_per_s(ms(10), 0.0, 4e6), 4e8);
        assert_eq!(connection_bytes_per_s(Duration::ZERO, 0.01, 4e6), f64::INFINITY);
        assert!(connection_bytes_per_s(ms(60), 0.001, 4e6) < 1.5e6);
    }
}
