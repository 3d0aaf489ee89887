/* Python objects and records: scalars and small tuples here, all else by shmheap.values. */

#include "coll.h"

#include <math.h>
#include <string.h>

static bool load_values(void)
{
    if (state->decode_value != NULL)
        return true;
    PyObject *m = PyImport_ImportModule("shmheap.values");
    if (m == NULL)
        return false;
    state->encode_value = PyObject_GetAttrString(m, "encode");
    state->decode_value = PyObject_GetAttrString(m, "decode");
    Py_DECREF(m);
    return !PyErr_Occurred();
}

/* Numbers without the bytes that say nothing */

static uint32_t put_int(int64_t n, uint8_t bytes[8])
{
    uint32_t len = 0;
    for (int64_t rest = n; len < 8; rest >>= 8) {
        bool sign_is_said = len > 0 ? (bytes[len - 1] & 0x80) == (n < 0 ? 0x80 : 0) : n == 0;
        if (rest == (n < 0 ? -1 : 0) && sign_is_said)
            break;
        bytes[len++] = (uint8_t)rest;
    }
    return len;
}

static int64_t get_int(const uint8_t *bytes, uint32_t len)
{
    uint64_t n = len > 0 && bytes[len - 1] & 0x80 ? ~0ull : 0;
    for (uint32_t i = len < 8 ? len : 8; i-- > 0;)
        n = n << 8 | bytes[i];
    return (int64_t)n;
}

static uint32_t put_double(double d, uint8_t bytes[8])
{
    uint64_t bits;
    uint32_t len = 8;
    memcpy(&bits, &d, 8);
    for (uint32_t i = 0; i < 8; i++)
        bytes[i] = (uint8_t)(bits >> (56 - 8 * i));
    while (len > 0 && bytes[len - 1] == 0)
        len--;
    return len;
}

static double get_double(const uint8_t *bytes, uint32_t len)
{
    uint64_t bits = 0;
    double d;
    for (uint32_t i = 0; i < 8; i++)
        bits = bits << 8 | (i < len ? bytes[i] : 0);
    memcpy(&d, &bits, 8);
    return d;
}

/* The text's UTF-8; lone surrogates are kept as they are, as in file names. */
static const char *utf8_of(PyObject *o, Py_ssize_t *n, PyObject **owner)
{
    const char *utf8 = PyUnicode_AsUTF8AndSize(o, n);
    if (utf8 != NULL || !PyErr_ExceptionMatches(PyExc_UnicodeEncodeError))
        return utf8;
    PyErr_Clear();
    *owner = PyUnicode_AsEncodedString(o, "utf-8", "surrogatepass");
    if (*owner == NULL)
        return NULL;
    *n = PyBytes_Size(*owner);
    return PyBytes_AsString(*owner);
}

/* Values */

static bool plain(struct value *value, uint32_t kind, const void *bytes, uint64_t nbytes)
{
    value->v = (struct sh_value){.kind = kind, .bytes = bytes, .nbytes = (uint32_t)nbytes};
    return nbytes <= SH_VALUE_MAX;
}

#define DEEP 8u /* tuples in tuples; of more, shmheap.values */

static bool small_tuple(PyObject *o, struct value *value, uint32_t deep);

/* Scalars and small tuples. False without an error: it is none, or too long. */
static bool scalar(PyObject *o, struct value *value, uint32_t deep)
{
    Py_ssize_t n = 0;
    int overflow = 0;
    if (o == Py_None)
        return plain(value, SH_V_NONE, NULL, 0);
    if (PyBool_Check(o))
        return plain(value, o == Py_True ? SH_V_TRUE : SH_V_FALSE, NULL, 0);
    if (PyLong_CheckExact(o)) {
        long long i = PyLong_AsLongLongAndOverflow(o, &overflow);
        return overflow == 0 && plain(value, SH_V_INT, value->bytes, put_int(i, value->bytes));
    }
    if (PyFloat_CheckExact(o))
        return plain(value, SH_V_FLOAT, value->bytes,
                     put_double(PyFloat_AsDouble(o), value->bytes));
    if (PyUnicode_CheckExact(o)) {
        const char *utf8 = utf8_of(o, &n, &value->owner);
        return utf8 != NULL && plain(value, SH_V_STR, utf8, (uint64_t)n);
    }
    if (PyBytes_CheckExact(o) && PyBytes_AsStringAndSize(o, (char **)&value->v.bytes, &n) == 0)
        return plain(value, SH_V_BYTES, value->v.bytes, (uint64_t)n);
    return PyTuple_CheckExact(o) && deep < DEEP && small_tuple(o, value, deep);
}

/* Puts one behind the others. False: there is no room. */
static bool put_item(struct value *value, uint32_t *used, const struct sh_value *item)
{
    uint32_t n = item->nbytes, head = n < 15 ? 1 : 2;
    if (n > UINT8_MAX || *used + head + n > TUPLE_MAX)
        return false;
    value->bytes[*used] = (uint8_t)(item->kind | (n < 15 ? n : 15) << 4);
    if (head == 2)
        value->bytes[*used + 1] = (uint8_t)n;
    if (n != 0)
        memcpy(value->bytes + *used + head, item->bytes, n);
    *used += head + n;
    return true;
}

static bool small_tuple(PyObject *o, struct value *value, uint32_t deep)
{
    uint32_t used = 0;
    for (Py_ssize_t i = 0, n = PyTuple_Size(o); i < n; i++) {
        struct value item;
        item.owner = NULL;
        bool fits =
            scalar(PyTuple_GetItem(o, i), &item, deep + 1) && put_item(value, &used, &item.v);
        Py_XDECREF(item.owner);
        if (!fits)
            return false;
    }
    return plain(value, SH_V_TUPLE, value->bytes, used);
}

static bool blocks_of(struct box *b, PyObject *blocks, struct value *value)
{
    Py_ssize_t n = PyTuple_Size(blocks);
    struct sh_ref *refs = value->refs;
    if (n > (Py_ssize_t)SH_REFS_MAX) {
        PyErr_Format(PyExc_ValueError, "a value names at most %d blocks, not %zd", SH_REFS_MAX, n);
        return false;
    }
    if (n > 4 && (refs = value->more = PyMem_Calloc((size_t)n, sizeof *refs)) == NULL)
        return PyErr_NoMemory() != NULL;
    for (Py_ssize_t i = 0; i < n; i++) {
        Block *block = (Block *)PyTuple_GetItem(blocks, i);
        if (Py_TYPE((PyObject *)block) != state->block_type) {
            PyErr_SetString(PyExc_TypeError, "a value names Blocks");
            return false;
        }
        if (!handle_usable(block))
            return false;
        if (!ref_here(b, block, &refs[i])) {
            PyErr_SetString(PyExc_ValueError, "the block belongs to another heap");
            return false;
        }
    }
    value->v.refs = refs;
    value->v.nrefs = (uint32_t)n;
    return true;
}

/* encode(container, value) -> (kind, bytes, blocks) */
static bool other(PyObject *container, struct box *b, PyObject *o, struct value *value)
{
    int kind;
    PyObject *blocks;
    const char *bytes;
    Py_ssize_t n;
    if (!load_values())
        return false;
    Py_CLEAR(value->owner);
    value->owner = PyObject_CallFunctionObjArgs(state->encode_value, container, o, NULL);
    if (value->owner == NULL)
        return false;
    if (!PyTuple_Check(value->owner) ||
        !PyArg_ParseTuple(value->owner, "iy#O!", &kind, &bytes, &n, &PyTuple_Type, &blocks))
        return false;
    if (kind < SH_V_OTHER || kind > 255 || !plain(value, (uint32_t)kind, bytes, (uint64_t)n)) {
        PyErr_Format(PyExc_ValueError, "a value's record has at most %d bytes, not %zd",
                     SH_VALUE_MAX, n);
        return false;
    }
    return blocks_of(b, blocks, value);
}

bool value_from(PyObject *container, struct box *b, PyObject *o, struct value *value)
{
    value->owner = NULL;
    value->more = NULL;
    if (scalar(o, value, 0))
        return true;
    if (!PyErr_Occurred() && other(container, b, o, value))
        return true;
    value_end(value);
    return false;
}

void value_end(struct value *value)
{
    Py_XDECREF(value->owner);
    if (value->more != NULL)
        PyMem_Free(value->more);
}

static PyObject *tuple_of(const uint8_t *bytes, uint32_t n, uint32_t deep);

static PyObject *scalar_of(uint32_t kind, const uint8_t *bytes, uint32_t n, uint32_t deep)
{
    if (kind == SH_V_TUPLE && deep < DEEP)
        return tuple_of(bytes, n, deep);
    switch (kind) {
    case SH_V_NONE:
        return Py_NewRef(Py_None);
    case SH_V_FALSE:
    case SH_V_TRUE:
        return PyBool_FromLong(kind == SH_V_TRUE);
    case SH_V_INT:
        return PyLong_FromLongLong(get_int(bytes, n));
    case SH_V_FLOAT:
        return PyFloat_FromDouble(get_double(bytes, n));
    case SH_V_STR:
        return PyUnicode_DecodeUTF8((const char *)bytes, (Py_ssize_t)n, "surrogatepass");
    case SH_V_BYTES:
        return PyBytes_FromStringAndSize((const char *)bytes, (Py_ssize_t)n);
    default:
        return PyErr_Format(state->HeapCorrupt, "a record has a value of kind %u", kind);
    }
}

/* The item that starts there, as far as there are bytes. False: that was all. */
static bool next_item(const uint8_t **at, const uint8_t *end, struct sh_value *item)
{
    if (*at == end)
        return false;
    uint32_t head = *(*at)++, n = head >> 4;
    if (n == 15 && *at < end)
        n = *(*at)++;
    n = n < end - *at ? n : (uint32_t)(end - *at);
    *item = (struct sh_value){.kind = head & 15u, .nbytes = n, .bytes = *at};
    *at += n;
    return true;
}

static PyObject *tuple_of(const uint8_t *bytes, uint32_t n, uint32_t deep)
{
    struct sh_value item;
    Py_ssize_t i = 0;
    const uint8_t *at = bytes, *end = bytes + n;
    while (next_item(&at, end, &item))
        i++;
    PyObject *tuple = PyTuple_New(i), *value;
    at = bytes;
    for (i = 0; tuple != NULL && next_item(&at, end, &item); i++) {
        if ((value = scalar_of(item.kind, item.bytes, item.nbytes, deep + 1)) == NULL)
            Py_CLEAR(tuple);
        else
            PyTuple_SetItem(tuple, i, value);
    }
    return tuple;
}

void found_end(struct box *b, struct sh_found *f)
{
    enum sh_status s;
    if (!f->pinned)
        return;
    f->pinned = false;
    s = sh_unpin(&b->ctx, &f->record, 0);
    if (s == SH_OK)
        return;
    box_enter(b);
    Py_BEGIN_ALLOW_THREADS
        while (s == SH_BUSY)
            s = sh_unpin(&b->ctx, &f->record, SLICE_MS);
        while (s == SH_DEFERRED || s == SH_BUSY)
            s = sh_flush(&b->ctx, SLICE_MS);
    Py_END_ALLOW_THREADS
    box_leave(b);
}

/* The blocks that a record names, as handles. */
static PyObject *blocks_in(struct box *b, const struct sh_found *f)
{
    PyObject *blocks = PyTuple_New(f->nrefs);
    for (uint32_t i = 0; blocks != NULL && i < f->nrefs; i++) {
        enum sh_status s = SH_NOMEM;
        Block *block = block_new(b);
        if (block != NULL)
            DO(b, s, sh_record_ref(&b->ctx, f, i, wait, &block->ref));
        if (block != NULL && s == SH_OK) {
            PyTuple_SetItem(blocks, (Py_ssize_t)i, (PyObject *)block);
            continue;
        }
        if (block != NULL)
            block_discard(block);
        if (!PyErr_Occurred())
            fail(b, s == SH_ABSENT ? SH_CORRUPT : s);
        Py_CLEAR(blocks);
    }
    return blocks;
}

static PyObject *other_of(PyObject *container, struct box *b, const struct sh_found *f)
{
    PyObject *blocks = load_values() ? blocks_in(b, f) : NULL;
    PyObject *bytes =
        blocks ? PyBytes_FromStringAndSize((const char *)f->value, (Py_ssize_t)f->nbytes) : NULL;
    PyObject *value = NULL;
    if (bytes != NULL)
        value =
            PyObject_CallFunction(state->decode_value, "OIOO", container, f->kind, bytes, blocks);
    Py_XDECREF(bytes);
    Py_XDECREF(blocks);
    return value;
}

PyObject *value_decode(PyObject *container, struct box *b, struct sh_found *f)
{
    PyObject *value = f->kind < SH_V_OTHER ? scalar_of(f->kind, f->value, f->nbytes, 0)
                                           : other_of(container, b, f);
    found_end(b, f);
    return value;
}

/* Keys. Numbers that are equal are one key: whole ones are INT, real ones FLOAT. The form says what
 * the key was. */

enum {
    AS_IT_IS,
    AS_BOOL,
    AS_FLOAT,
    AS_COMPLEX,
    AS_MINUS_ZERO
};

static bool key_is(struct key *key, uint32_t kind, uint32_t form, const void *bytes, uint64_t n)
{
    if (n > SH_KEY_MAX) {
        PyErr_Format(PyExc_ValueError, "a key has at most %d bytes, this one %llu", SH_KEY_MAX,
                     (unsigned long long)n);
        return false;
    }
    key->k = (struct sh_key){.kind = kind, .form = form, .nbytes = (uint32_t)n, .bytes = bytes};
    key->k.hash = sh_hash(bytes, n, kind);
    return true;
}

/* An int of any size: the same bytes as of a small one, just more. */
static bool int_key(PyObject *o, struct key *key, uint32_t form)
{
    int overflow;
    long long i = PyLong_AsLongLongAndOverflow(o, &overflow);
    if (overflow == 0)
        return !PyErr_Occurred() && key_is(key, SH_V_INT, form, key->bytes, put_int(i, key->bytes));
    PyObject *bits = PyObject_CallMethod(o, "bit_length", NULL);
    Py_ssize_t n = bits ? PyLong_AsSsize_t(bits) / 8 + 1 : 0;
    Py_XDECREF(bits);
    PyObject *bytes = NULL, *call = n ? PyObject_GetAttrString(o, "to_bytes") : NULL;
    PyObject *args = call ? Py_BuildValue("ns", n, "little") : NULL;
    PyObject *named = args ? Py_BuildValue("{sO}", "signed", Py_True) : NULL;
    if (named != NULL)
        bytes = PyObject_Call(call, args, named);
    Py_XDECREF(call);
    Py_XDECREF(args);
    Py_XDECREF(named);
    key->owner = bytes;
    return bytes != NULL && key_is(key, SH_V_INT, form, PyBytes_AsString(bytes), (uint64_t)n);
}

static bool float_key(double d, struct key *key, uint32_t form)
{
    if (!isfinite(d) || d != floor(d)) {
        uint32_t n = put_double(isnan(d) ? (double)NAN : d, key->bytes);
        return key_is(key, SH_V_FLOAT, form, key->bytes, n);
    }
    if (form == AS_IT_IS)
        form = d == 0 && signbit(d) ? AS_MINUS_ZERO : AS_FLOAT;
    if (fabs(d) < 9e18)
        return key_is(key, SH_V_INT, form, key->bytes, put_int((int64_t)d, key->bytes));
    PyObject *whole = PyLong_FromDouble(d);
    bool done = whole != NULL && int_key(whole, key, form);
    Py_XDECREF(whole);
    return done;
}

static bool complex_key(PyObject *o, struct key *key)
{
    double parts[2] = {PyComplex_RealAsDouble(o), PyComplex_ImagAsDouble(o)};
    if (parts[1] == 0)
        return float_key(parts[0], key, AS_COMPLEX);
    uint32_t form = parts[0] == 0 && signbit(parts[0]) ? AS_MINUS_ZERO : AS_IT_IS;
    if (parts[0] == 0)
        parts[0] = 0; /* -0.0 equals it */
    memcpy(key->bytes, parts, sizeof parts);
    return key_is(key, SH_V_COMPLEX, form, key->bytes, sizeof parts);
}

static bool index_key(PyObject *o, struct key *key)
{
    PyObject *whole = PyNumber_Index(o);
    bool done = whole != NULL && int_key(whole, key, AS_IT_IS);
    Py_XDECREF(whole);
    return done;
}

static bool find_key(PyObject *o, struct key *key)
{
    Py_ssize_t n = 0;
    if (PyUnicode_Check(o)) {
        const char *utf8 = utf8_of(o, &n, &key->owner);
        return utf8 != NULL && key_is(key, SH_V_STR, AS_IT_IS, utf8, (uint64_t)n);
    }
    if (PyBool_Check(o))
        return int_key(o, key, AS_BOOL);
    if (PyLong_Check(o))
        return int_key(o, key, AS_IT_IS);
    if (PyFloat_Check(o))
        return float_key(PyFloat_AsDouble(o), key, AS_IT_IS);
    if (PyBytes_Check(o))
        return key_is(key, SH_V_BYTES, AS_IT_IS, PyBytes_AsString(o), (uint64_t)PyBytes_Size(o));
    if (o == Py_None)
        return key_is(key, SH_V_NONE, AS_IT_IS, "", 0);
    if (PyComplex_Check(o))
        return complex_key(o, key);
    if (PyIndex_Check(o))
        return index_key(o, key);
    PyErr_Format(PyExc_TypeError,
                 "a key is None, a bool, int, float, complex, str or bytes, not %R",
                 (PyObject *)Py_TYPE(o));
    return false;
}

bool key_from(PyObject *o, struct key *key)
{
    key->owner = NULL;
    if (find_key(o, key))
        return true;
    Py_CLEAR(key->owner);
    return false;
}

static PyObject *big_int(const uint8_t *bytes, uint32_t n)
{
    PyObject *type = (PyObject *)&PyLong_Type, *value = NULL;
    PyObject *from = PyObject_GetAttrString(type, "from_bytes");
    PyObject *args = Py_BuildValue("y#s", bytes, (Py_ssize_t)n, "little");
    PyObject *named = Py_BuildValue("{sO}", "signed", Py_True);
    if (from != NULL && args != NULL && named != NULL)
        value = PyObject_Call(from, args, named);
    Py_XDECREF(from);
    Py_XDECREF(args);
    Py_XDECREF(named);
    return value;
}

static PyObject *as_form(PyObject *whole, uint32_t form)
{
    if (whole == NULL || form == AS_IT_IS)
        return whole;
    PyObject *value = NULL;
    if (form == AS_BOOL)
        value = PyBool_FromLong(PyObject_IsTrue(whole));
    else if (form == AS_FLOAT)
        value = PyNumber_Float(whole);
    else if (form == AS_MINUS_ZERO)
        value = PyFloat_FromDouble(-0.0);
    else
        value = PyComplex_FromDoubles(PyFloat_AsDouble(whole), 0);
    Py_DECREF(whole);
    return PyErr_Occurred() ? NULL : value;
}

PyObject *key_decode(const struct sh_found *f)
{
    double parts[2];
    if (f->key_kind == SH_V_INT && f->key_bytes > 8)
        return as_form(big_int(f->key, f->key_bytes), f->key_form);
    if (f->key_kind == SH_V_COMPLEX && f->key_bytes == sizeof parts) {
        memcpy(parts, f->key, sizeof parts);
        return PyComplex_FromDoubles(f->key_form == AS_MINUS_ZERO ? -0.0 : parts[0], parts[1]);
    }
    return as_form(scalar_of(f->key_kind, f->key, f->key_bytes, 0), f->key_form);
}
