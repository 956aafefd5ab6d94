//! The cases: guests and links.

use crate::workload::Workload;

/// What a capped or shaped case allows, in bytes per second: 1 Gbit/s.
pub const LINK_BYTES_PER_S: f64 = 125e6;

/// The same for `tc`.
pub const LINK_MEGABITS_PER_S: u32 = 1000;

/// What stands between the hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Nothing but the machine itself.
    Uncapped,
    /// The mover is told to keep to 1 Gbit/s, and may exceed it in the pause.
    Capped,
    /// The link carries no more than 1 Gbit/s, and the mover does not know.
    Shaped,
}

/// One guest over one link.
#[derive(Debug, Clone)]
pub struct Case {
    /// For people and scripts.
    pub name: &'static str,
    /// The guest.
    pub workload: Workload,
    /// Pages of it that are not zero once it has written its working set.
    pub contents_pages: u64,
    /// The link.
    pub link: Link,
    /// How memory moves.
    pub copy: Copying,
}

/// How memory moves. One is not compared with the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copying {
    /// Before the guest does.
    Pre,
    /// What is dirty after the first pass follows the guest.
    Post,
}

impl Case {
    /// Whether the guest writes.
    pub fn writes(&self) -> bool {
        self.workload.rate != "0"
    }
}

/// All cases; with a seed, rates and sizes are drawn at random within a fifth of what they are without.
pub fn all(seed: Option<u64>) -> Vec<Case> {
    let mut draw = Draw(seed.map(fastrand::Rng::with_seed));
    let mut cases = Vec::new();
    let mut add = |name, guest: Guest, copy, links: &[(&'static str, Link)]| {
        let (contents_mib, workload) = guest.draw(&mut draw);
        for &(suffix, link) in links {
            let name: &'static str = format!("{name}{suffix}").leak();
            cases.push(Case { name, workload: workload.clone(), contents_pages: contents_mib << 8, link, copy });
        }
    };
    let guest = Guest {
        memory_mib: 1024,
        fill_mib: 0,
        working_set_mib: 240,
        rate: Some(30_000),
        write: "word",
        contents: "random",
    };
    let uncapped = &[("", Link::Uncapped)];
    let capped = &[("-capped", Link::Capped)];
    let slow = &[("-capped", Link::Capped), ("-shaped", Link::Shaped)];
    let every = &[("", Link::Uncapped), ("-capped", Link::Capped), ("-shaped", Link::Shaped)];
    let pre = Copying::Pre;
    add("idle-1g", Guest { memory_mib: 1280, fill_mib: 1024, rate: Some(0), ..guest }, pre, uncapped);
    add(
        "idle-sparse-4g",
        Guest { memory_mib: 4096, fill_mib: 64, working_set_mib: 16, rate: Some(0), ..guest },
        pre,
        uncapped,
    );
    add("30k", guest, pre, every);
    add("flat-out", Guest { rate: None, ..guest }, pre, every);
    add("compressible", Guest { fill_mib: 512, contents: "compressible", ..guest }, pre, capped);
    add("fresh-pages", Guest { fill_mib: 512, rate: Some(15_000), write: "page", ..guest }, pre, capped);
    add("random-4g", Guest { memory_mib: 4608, fill_mib: 4096, rate: Some(0), ..guest }, pre, uncapped);
    add("postcopy", Guest { rate: None, write: "page", ..guest }, Copying::Post, slow);
    cases
}

/// A guest in numbers.
#[derive(Clone, Copy)]
struct Guest {
    memory_mib: u64,
    fill_mib: u64,
    working_set_mib: u64,
    /// Pages per second; none: flat out.
    rate: Option<u64>,
    write: &'static str,
    contents: &'static str,
}

impl Guest {
    /// MiB that will not be zero, and the guest as options.
    fn draw(self, draw: &mut Draw) -> (u64, Workload) {
        let (fill_mib, working_set_mib) = (draw.near(self.fill_mib), draw.near(self.working_set_mib));
        let rate = self.rate.map(|rate| draw.near(rate));
        // Room for what was drawn, and as much free memory as without.
        let memory_mib = self.memory_mib + fill_mib.saturating_sub(self.fill_mib).next_multiple_of(64);
        let mib = |number: u64| -> &'static str { format!("{number}M").leak() };
        let workload = Workload {
            memory: mib(memory_mib),
            vcpus: 1,
            fill: mib(fill_mib),
            working_set: mib(working_set_mib),
            rate: rate.map_or("max", |rate| rate.to_string().leak()),
            order: "seq",
            write: self.write,
            contents: self.contents,
            seed: draw.seed(),
        };
        let written_mib = if self.rate == Some(0) { 0 } else { working_set_mib };
        (fill_mib.max(written_mib), workload)
    }
}

/// Numbers near given ones, or those themselves.
struct Draw(Option<fastrand::Rng>);

impl Draw {
    fn near(&mut self, number: u64) -> u64 {
        match &mut self.0 {
            Some(random) => number * random.u64(80..=120) / 100,
            None => number,
        }
    }

    fn seed(&mut self) -> u64 {
        self.0.as_mut().map_or(1, |random| random.u64(..))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_has_a_name_of_its_own() {
        let mut names: Vec<_> = all(None).iter().map(|case| case.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 13);
        assert!(names.contains(&"flat-out-shaped") && names.contains(&"idle-sparse-4g"), "{names:?}");
    }

    #[test]
    fn a_seed_draws_near_by_and_again_the_same() {
        let words = |seed| all(seed).iter().map(|case| format!("{:?}", case.workload)).collect::<Vec<_>>();
        assert_eq!(words(Some(7)), words(Some(7)));
        assert_ne!(words(Some(7)), words(Some(8)));
        for (drawn, plain) in all(Some(7)).iter().zip(all(None)) {
            assert_eq!(drawn.writes(), plain.writes());
            let ratio = drawn.contents_pages as f64 / plain.contents_pages as f64;
            assert!((0.79..=1.21).contains(&ratio), "{}: {ratio}", drawn.name);
        }
    }
}
