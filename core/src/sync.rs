//! Locks.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks, also if whoever held it has panicked: what these locks guard is whole between any two statements.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
