//! From a round's first page to what it has left dirty, and the looks at the first one.

use std::time::{Duration, Instant};

use super::super::control::{Done, RoundSent};
use super::super::flow::Flow;
use super::super::jobs;
use super::{Driver, Input};
use crate::progress::PageCounts;

/// A round under way.
pub(super) struct Round {
    began: Instant,
    /// Before it.
    pages: PageCounts,
    written_bytes: u64,
    capped: bool,
    /// Once all of it has been written.
    written: Option<Written>,
}

/// A round whose last pages may still be on their way.
struct Written {
    pages: u64,
    again: u64,
    duration: Duration,
    /// Until when their acknowledgement is waited for.
    until: Instant,
}

/// Under a cap the link has carried all but the last pages by the time that these are written. What has not been acknowledged counts as
/// queued, and acknowledgements come once in four megabytes: the last one is waited for, for so long at most.
const ACKNOWLEDGED_WITHIN: Duration = Duration::from_millis(5);

impl Round {
    /// It begins now.
    pub(super) fn begin(flow: &Flow) -> Self {
        let (pages, written_bytes) = (flow.pages(), flow.all_written_bytes());
        Self { began: Instant::now(), pages, written_bytes, capped: flow.bytes_per_s().is_some(), written: None }
    }

    /// What it has written, as it takes on the wire.
    fn wire_bytes(&self, flow: &Flow) -> u64 {
        flow.on_wire(flow.all_written_bytes() - self.written_bytes)
    }

    /// Whether how long it took says what its pages cost, and not what the link takes.
    fn is_by_pages(&self, flow: &Flow) -> bool {
        let (now, before) = (flow.pages(), self.pages);
        2 * (now.delta - before.delta) > now.visited() - before.visited() && !flow.is_slow()
    }

    /// For how long its acknowledgement is still waited for.
    pub(super) fn patience(&self) -> Option<Duration> {
        Some(self.written.as_ref()?.until.saturating_duration_since(Instant::now()))
    }
}

impl Driver {
    pub(super) fn round_written(&mut self, pages: u64, again: u64) {
        let wait = self.handle.flow.bytes_per_s().map_or(Duration::ZERO, |_| ACKNOWLEDGED_WITHIN);
        if let Some(round) = &mut self.round {
            let (duration, until) = (round.began.elapsed(), Instant::now() + wait);
            round.written = Some(Written { pages, again, duration, until });
        }
        self.end_round();
    }

    /// Ends the round under way if all of it is written and there is nothing more to wait for.
    pub(super) fn end_round(&mut self) {
        let Some(data) = &self.data else { return };
        let acknowledged = data.queued_bytes() == 0;
        let over = |written: &mut Written| acknowledged || Instant::now() >= written.until;
        let Some(Written { pages, again, duration, .. }) =
            self.round.as_mut().and_then(|round| round.written.take_if(over))
        else {
            return;
        };
        let Some(round) = self.round.take() else { return };
        let flow = &self.handle.flow;
        let mut sent = RoundSent {
            duration,
            pages,
            again,
            wire_bytes: round.wire_bytes(flow),
            capped: round.capped || flow.bytes_per_s().is_some(),
            by_pages: round.is_by_pages(flow),
            ..RoundSent::default()
        };
        let harvesting = Instant::now();
        if let Err(error) = jobs::harvest(&*self.machine, &data.shared.pages, &data.harvester) {
            return self.input(Input::Failed(error.to_string()));
        }
        sent.harvest = harvesting.elapsed();
        sent.dirty_pages = data.shared.pages.pending.count();
        sent.queued_bytes = data.queued_bytes();
        sent.applying = self.applying.time_for(data.queued_pages());
        sent.seen =
            self.watch.as_mut().map(|watch| watch.round_ended(&data.shared.pages, flow.now())).unwrap_or_default();
        self.handle.round_ended(&sent);
        self.input(Input::Done(Done::RoundSent(sent)));
    }

    /// Looks at what the guest has dirtied so far in the first pass, if that is due.
    pub(super) fn look(&mut self) {
        let (Some(watch), Some(data), Some(round)) = (&mut self.watch, &self.data, &self.round) else { return };
        let flow = &self.handle.flow;
        if watch.due().is_none_or(|due| flow.now() < due) {
            return;
        }
        let input = match watch.look(&data.shared.pages, self.machine.dirty_log(), &|| flow.now()) {
            Ok(seen) => Input::Looked(RoundSent {
                duration: round.began.elapsed(),
                pages: flow.pages().visited() - round.pages.visited(),
                wire_bytes: round.wire_bytes(flow),
                dirty_pages: seen.dirty_pages.iter().sum::<f64>() as u64,
                queued_bytes: data.queued_bytes(),
                capped: round.capped,
                by_pages: round.is_by_pages(flow),
                seen,
                ..RoundSent::default()
            }),
            Err(error) => Input::Failed(error.to_string()),
        };
        self.input(input);
    }
}
