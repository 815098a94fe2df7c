//! What an engine has to do: keep sealed rows, let one writer at a time have a grant, and tell of what others write.
//!
//! The rotation protocol (SEMANTICS C12 to C14) is above this trait, in `tokens`, once for all engines. It holds if an engine
//! keeps these promises:
//!
//! - **Durable means durable.** When a writing method gives `Ok`, the change survives the death of this process and, as far
//!   as the engine's own disk or standby does, a power cut. [`Engine::intend`] must be so before the refresh token is sent,
//!   [`Engine::put`] before the new access token is used. `Err` says nothing: the change may have been made, and the caller
//!   looks.
//! - **The generation is the fence.** `put`, `intend` and `mark` change a row only while it has the generation that the
//!   caller read, in one step that no other writer can divide. Generations of one grant never repeat, also over a removal.
//! - **A lease saves calls**, and is no fence by itself. It ends with its holder's death, or at its time where death cannot
//!   be seen; `intend` refuses who no longer holds it.
//!
//! Engines see nothing but sealed bytes: no engine has the keys.

use std::any::Any;
use std::collections::HashMap;
use std::fmt;

use async_trait::async_trait;

use super::{Most, StoreError};
use crate::names::{ProviderName, Subject};

pub(super) type Result<T> = std::result::Result<T, StoreError>;

/// See the module's page.
#[async_trait]
pub(super) trait Engine: Send + Sync + 'static {
    /// Where it is, as people are told: a path, or an address without credentials.
    fn at(&self) -> &str;

    /// What was sealed when the store was made, to tell a wrong key before there are rows.
    async fn key_check(&self) -> Result<Option<Vec<u8>>>;

    /// One grant.
    async fn grant(&self, names: &Names) -> Result<Option<Record>>;

    /// All grants, in order. One whose columns are not of their types is an error in its place.
    async fn grants(&self) -> Result<Vec<(Names, Result<Record>)>>;

    /// How many grants of each provider are of which target and in which state.
    async fn census(&self) -> Result<Vec<Count>>;

    /// The generations of those of `of` that are there.
    async fn generations(&self, of: &[Names]) -> Result<HashMap<Names, u64>>;

    /// Writes a record if the stored generation is `previous` (`None`: there is no row); whether it did.
    async fn put(&self, record: &Record, previous: Option<u64>) -> Result<bool>;

    /// Writes a record in place of whatever is there, with a generation above all that this grant has had; which one.
    async fn replace(&self, record: &Record) -> Result<u64>;

    /// Removes a grant, remembers its generation, and gives what was sealed in it: refresh token, access token.
    async fn remove(&self, names: &Names) -> Result<Option<Gone>>;

    /// Writes an intent if the stored generation is `generation`, and `owner` still holds the lease.
    async fn intend(&self, names: &Names, generation: u64, intent: &IntentRecord, owner: Owner) -> Result<Intended>;

    /// Sets a grant's state and clears its intent, if the stored generation is `generation` and the intent still is this
    /// one: another one's is not cleared. Whether it did.
    async fn mark(&self, names: &Names, generation: u64, intent: &IntentRecord, state: &StateRecord) -> Result<bool>;

    /// Sets the state of all grants of a provider that are in the state `from`. Their generations, intents and leases stay,
    /// and nobody is told.
    async fn mark_all(&self, provider: &ProviderName, from: &str, to: &StateRecord) -> Result<()>;

    /// Takes the lease of a grant; `None` while another one holds it. One that was inherited, and is
    /// given back before there was an intent of this owner's, is inherited by the next one, too.
    async fn lease(&self, names: &Names, owner: Owner) -> Result<Option<Held>>;

    /// Keeps the lease from ending soon, if `owner` still holds it; whether that is so.
    async fn prolong(&self, names: &Names, owner: Owner) -> Result<bool>;

    /// Keeps a flow of a user; drops ended ones and the oldest above `most`.
    async fn put_flow(&self, flow: &FlowRecord, most: Most, now: i64) -> Result<()>;

    /// Counts one more take of a flow, and gives it.
    async fn take_flow(&self, id: [u8; 32]) -> Result<Option<TakenRecord>>;

    /// A secret of the sidecar's own.
    async fn sealed(&self, name: &str) -> Result<Option<Vec<u8>>>;

    /// Writes such a secret if what is stored is `previous`, byte for byte; whether it did.
    async fn put_sealed(&self, name: &str, value: &[u8], previous: Option<&[u8]>) -> Result<bool>;

    /// What others change from now on.
    async fn changes(&self) -> Box<dyn Changes>;

    /// All that is kept, as of one moment.
    async fn snapshot(&self) -> Result<Snapshot>;

    /// Puts values that are sealed anew in the place of those that they were opened from, each only while that one is there,
    /// byte for byte; how many. Generations and leases stay, and nobody is told: nothing has changed but the seal.
    async fn reseal(&self, batch: &[Resealed]) -> Result<usize>;

    /// Writes all of a plan, or nothing where something has changed since it was made; whether it did.
    async fn carry_out(&self, plan: &Plan) -> Result<bool>;
}

/// So many grants of a provider are of one target and in one state, as they are kept.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Count {
    pub provider: String,
    pub target: String,
    pub state: StateRecord,
    pub grants: u64,
}

/// What others change in a store: other processes, and other handles in this one.
#[async_trait]
pub(super) trait Changes: Send {
    /// Waits for the next change. One that is told twice is harmless; one that is not told is a fault.
    async fn next(&mut self) -> Change;
}

/// What has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// This grant.
    Of(ProviderName, Subject),
    /// Perhaps anything: it is for the caller to look.
    Anything,
}

/// Whose grant it is, at which provider.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Names {
    pub provider: ProviderName,
    pub subject: Subject,
}

/// Who holds a lease: 128 random bits for each that is taken.
pub(super) type Owner = [u8; 16];

/// A lease that was taken.
pub(super) struct Held {
    /// Gives it back when dropped.
    pub _guard: Box<dyn Any + Send + Sync>,
    /// Whether it was taken from one who let its time pass, and may be alive; or from one who had it so, and gave it back
    /// without an intent.
    pub inherited: bool,
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held").field("inherited", &self.inherited).finish_non_exhaustive()
    }
}

/// What became of an [`Engine::intend`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Intended {
    /// The intent is durable.
    Done,
    /// The grant has another generation, or is gone.
    Moved,
    /// The lease has gone to another one, or its time has passed.
    LeaseLost,
}

/// What was in a grant that is no longer there, as [`Record`] has it.
#[derive(Debug)]
pub(super) struct Gone {
    pub target: String,
    pub refresh_token: Option<Vec<u8>>,
    pub access_token: Option<Vec<u8>>,
}

/// A grant as it is kept: what is secret sealed, what is structured as JSON, times in milliseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub names: Names,
    pub generation: u64,
    pub target: String,
    pub refresh_token: Option<Vec<u8>>,
    pub access_token: Option<Vec<u8>>,
    pub obtained_at: Option<i64>,
    pub expires_at: Option<i64>,
    pub granted_scopes: Option<String>,
    pub further_scopes: Option<String>,
    pub state: StateRecord,
    pub intent: Option<IntentRecord>,
    pub renewed_at: Option<i64>,
    pub stored_at: i64,
}

/// A grant's state, in a word, and its reason.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct StateRecord {
    pub state: String,
    pub reason: Option<String>,
}

/// An intent: SHA-256 of the refresh token, and since when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct IntentRecord {
    pub hash: [u8; 32],
    pub at: i64,
}

/// A flow as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FlowRecord {
    pub id: [u8; 32],
    pub content: Vec<u8>,
    pub expires_at: i64,
    pub names: Names,
}

/// All that is kept, sealed.
pub(super) struct Snapshot {
    pub key_check: Option<Vec<u8>>,
    pub grants: Vec<(Names, Result<Record>)>,
    /// The last generation of grants that were removed.
    pub removed: Vec<(Names, u64)>,
    /// The sidecar's own secrets, by name.
    pub own: Vec<(String, Vec<u8>)>,
    /// The contents of flows, by what should be SHA-256 of their state.
    pub flows: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Where a sealed value is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Slot {
    KeyCheck,
    Own(String),
    RefreshToken(Names),
    AccessToken(Names),
    Flow(Vec<u8>),
}

/// A value that is sealed anew: where, as it was, and as it is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Resealed {
    pub slot: Slot,
    pub from: Vec<u8>,
    pub to: Vec<u8>,
}

/// What is to be written in one go.
#[derive(Debug, Clone, Default)]
pub(super) struct Plan {
    /// Grants, each with the generation in whose place it comes (`None`: there is no row).
    pub grants: Vec<(Record, Option<u64>)>,
    /// Generations of removed grants, to be remembered where no higher one is.
    pub removed: Vec<(Names, u64)>,
    /// The sidecar's own secrets, each with the value in whose place it comes.
    pub own: Vec<(String, Vec<u8>, Option<Vec<u8>>)>,
}

/// What is known of a flow that was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TakenRecord {
    pub content: Vec<u8>,
    pub expires_at: i64,
    /// How often it has been taken, this time included.
    pub times: i64,
}
