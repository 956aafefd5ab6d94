//! What is true, whatever the programs believe: what the guest has written, to memory and to its disk, and who runs it.

/// What must never happen, and has.
pub type Violation = String;

/// The guest's own view, and what has gone wrong.
pub struct Truth {
    /// Every byte that the guest and its devices wrote, by page.
    memory: Vec<u8>,
    /// Counts all that the guest does: part of its state.
    pub progress: u64,
    /// Disk writes that the guest has asked for and has not been told to be done.
    outstanding: Vec<u64>,
    requests: u64,
    violation: Option<Violation>,
}

const PAGE: usize = godwit_core::PAGE_SIZE;

impl Truth {
    /// A guest that has written nothing, with so many pages.
    pub fn new(pages: usize) -> Self {
        Self { memory: vec![0; pages * PAGE], progress: 0, outstanding: Vec::new(), requests: 0, violation: None }
    }

    /// A page, as the guest sees it.
    pub fn page(&self, page: usize) -> &[u8] {
        &self.memory[page * PAGE..][..PAGE]
    }

    /// The same, to be written to.
    pub fn page_mut(&mut self, page: usize) -> &mut [u8] {
        &mut self.memory[page * PAGE..][..PAGE]
    }

    /// The guest boots anew: its memory is empty, its disk is not.
    pub fn boot(&mut self) {
        self.memory.fill(0);
        self.progress = 0;
        self.outstanding.clear();
    }

    /// The guest asks for a disk write: its number.
    pub fn ask_disk(&mut self) -> u64 {
        self.requests += 1;
        self.outstanding.push(self.requests);
        self.requests
    }

    /// The guest is told that a disk write is done.
    pub fn disk_done(&mut self, request: u64) {
        self.outstanding.retain(|outstanding| *outstanding != request);
    }

    /// Disk writes that the guest waits for.
    pub fn outstanding(&self) -> &[u64] {
        &self.outstanding
    }

    /// Notes the first thing that must never happen.
    pub fn violate(&mut self, what: impl FnOnce() -> Violation) {
        self.violation.get_or_insert_with(what);
    }

    /// The first thing that must never happen and has.
    pub fn violation(&self) -> Option<&Violation> {
        self.violation.as_ref()
    }
}
