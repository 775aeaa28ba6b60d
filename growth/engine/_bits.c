/* The loops of growth/bits.py over 16-bit entries, which numpy makes several passes of. The same bits, and numpy goes on without them.

   lookup(table, index, out)           out[...] = table[index], of any 65,536 entries
   scale(stored, factor, bfloat, out)  out[...] = stored * factor, in float32, rounded to nearest, ties to even
   add(stored, values, bfloat)         stored[...] += values, in float32, rounded in the same way
   accumulate(rows, bfloat, total)     total += row for one row after the other, in float32
   largest(stored)                     the largest of the bits without their sign, in one piece of memory

   Stored entries are float16, or bfloat16 where `bfloat` is true. Arrays have equal shapes of at most three axes and any strides, as long as
   entries of the last axis lie side by side. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define F16C __attribute__((target("avx,f16c")))
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "stored entries are little-endian; numpy turns them round on other machines"
#endif

#define ENTRIES 65536

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float from_bfloat(uint16_t stored) {
    return as_float((uint32_t)stored << 16);
}

static inline uint16_t to_bfloat(float value) {
    uint32_t bits = as_bits(value);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > (255u << 23) ? 0x7FC0 : rounded);
}

static float from_half(uint16_t stored) {
    _Float16 half;
    memcpy(&half, &stored, sizeof half);
    return (float)half;
}

static uint16_t to_half(float value) {
    uint16_t stored;
    _Float16 half = (_Float16)value;
    memcpy(&stored, &half, sizeof stored);
    return stored;
}

/* What is done to a row of float16: eight entries at a time where the processor can, the rest one by one. */
#ifdef F16C
#define BY_EIGHT(name, ...) __builtin_cpu_supports("f16c") ? name##_by_eight(__VA_ARGS__) : 0
#define HALVES(at) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(at)))
#define PUT_HALVES(at, values) _mm_storeu_si128((__m128i *)(at), _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT))

F16C static Py_ssize_t scale_halves_by_eight(const uint16_t *stored, float factor, uint16_t *out, Py_ssize_t count) {
    Py_ssize_t at = 0;
    for (; at + 8 <= count; at += 8)
        PUT_HALVES(out + at, _mm256_mul_ps(HALVES(stored + at), _mm256_set1_ps(factor)));
    return at;
}

F16C static Py_ssize_t add_halves_by_eight(uint16_t *stored, const float *values, Py_ssize_t count) {
    Py_ssize_t at = 0;
    for (; at + 8 <= count; at += 8)
        PUT_HALVES(stored + at, _mm256_add_ps(HALVES(stored + at), _mm256_loadu_ps(values + at)));
    return at;
}

F16C static Py_ssize_t accumulate_halves_by_eight(const uint16_t *stored, float *total, Py_ssize_t count) {
    Py_ssize_t at = 0;
    for (; at + 8 <= count; at += 8)
        _mm256_storeu_ps(total + at, _mm256_add_ps(_mm256_loadu_ps(total + at), HALVES(stored + at)));
    return at;
}
#else
#define BY_EIGHT(name, ...) 0
#endif

static void scale_halves(const uint16_t *stored, float factor, uint16_t *out, Py_ssize_t count) {
    for (Py_ssize_t at = BY_EIGHT(scale_halves, stored, factor, out, count); at < count; at++)
        out[at] = to_half(from_half(stored[at]) * factor);
}

static void scale_bfloats(const uint16_t *stored, float factor, uint16_t *out, Py_ssize_t count) {
    for (Py_ssize_t at = 0; at < count; at++)
        out[at] = to_bfloat(from_bfloat(stored[at]) * factor);
}

static void add_halves(uint16_t *stored, const float *values, Py_ssize_t count) {
    for (Py_ssize_t at = BY_EIGHT(add_halves, stored, values, count); at < count; at++)
        stored[at] = to_half(from_half(stored[at]) + values[at]);
}

static void add_bfloats(uint16_t *stored, const float *values, Py_ssize_t count) {
    for (Py_ssize_t at = 0; at < count; at++)
        stored[at] = to_bfloat(from_bfloat(stored[at]) + values[at]);
}

static void accumulate_halves(const uint16_t *stored, float *total, Py_ssize_t count) {
    for (Py_ssize_t at = BY_EIGHT(accumulate_halves, stored, total, count); at < count; at++)
        total[at] += from_half(stored[at]);
}

static void accumulate_bfloats(const uint16_t *stored, float *total, Py_ssize_t count) {
    for (Py_ssize_t at = 0; at < count; at++)
        total[at] += from_bfloat(stored[at]);
}

static uint16_t largest_magnitude(const uint16_t *stored, Py_ssize_t count) {
    int16_t largest = 0;
    for (Py_ssize_t at = 0; at < count; at++) {
        int16_t magnitude = (int16_t)(stored[at] & 0x7FFF);
        largest = magnitude > largest ? magnitude : largest;
    }
    return (uint16_t)largest;
}

static void lookup_2(const uint16_t *table, const uint16_t *index, uint16_t *out, Py_ssize_t count) {
    for (Py_ssize_t at = 0; at < count; at++)
        out[at] = table[index[at]];
}

static void lookup_4(const uint32_t *table, const uint16_t *index, uint32_t *out, Py_ssize_t count) {
    for (Py_ssize_t at = 0; at < count; at++)
        out[at] = table[index[at]];
}

/* Two arrays of one shape, seen as (outer, middle) rows of `count` entries each. */
typedef struct {
    Py_buffer left, right;
    Py_ssize_t outer, middle, count;
} Pair;

static char *row(const Py_buffer *array, Py_ssize_t outer, Py_ssize_t middle) {
    char *start = array->buf;
    if (array->ndim == 3)
        start += outer * array->strides[0] + middle * array->strides[1];
    else if (array->ndim == 2)
        start += middle * array->strides[0];
    return start;
}

static int side_by_side(const Py_buffer *array, Py_ssize_t itemsize) {
    int last = array->ndim - 1;
    return array->itemsize == itemsize && last >= 0 && last < 3 && (array->shape[last] < 2 || array->strides[last] == itemsize);
}

static void release(Pair *pair) {
    PyBuffer_Release(&pair->left);
    PyBuffer_Release(&pair->right);
}

static int open_pair(Pair *pair, PyObject *left, int left_flags, Py_ssize_t left_size, PyObject *right, int right_flags, Py_ssize_t right_size) {
    if (PyObject_GetBuffer(left, &pair->left, left_flags) < 0)
        return -1;
    if (PyObject_GetBuffer(right, &pair->right, right_flags) < 0) {
        PyBuffer_Release(&pair->left);
        return -1;
    }
    const Py_buffer *first = &pair->left;
    int last = first->ndim - 1;
    int fits = side_by_side(first, left_size) && side_by_side(&pair->right, right_size) && pair->right.ndim == first->ndim &&
               memcmp(first->shape, pair->right.shape, sizeof(Py_ssize_t) * (size_t)first->ndim) == 0;
    if (!fits) {
        release(pair);
        PyErr_SetString(PyExc_ValueError, "expected arrays of one shape, of 1 to 3 axes, with the entries of the last one side by side");
        return -1;
    }
    pair->outer = first->ndim == 3 ? first->shape[0] : 1;
    pair->middle = first->ndim > 1 ? first->shape[last - 1] : 1;
    pair->count = first->shape[last];
    return 0;
}

static int open_table(PyObject *object, Py_buffer *table) {
    if (PyObject_GetBuffer(object, table, PyBUF_C_CONTIGUOUS) < 0)
        return -1;
    if (table->len == ENTRIES * table->itemsize && (table->itemsize == 2 || table->itemsize == 4))
        return 0;
    PyBuffer_Release(table);
    PyErr_SetString(PyExc_ValueError, "expected a table of 65,536 entries of 2 or 4 bytes");
    return -1;
}

static PyObject *lookup(PyObject *module, PyObject *arguments) {
    PyObject *table_object, *index, *out;
    Py_buffer table;
    Pair pair;
    if (!PyArg_ParseTuple(arguments, "OOO", &table_object, &index, &out) || open_table(table_object, &table) < 0)
        return NULL;
    if (open_pair(&pair, index, PyBUF_STRIDED_RO, 2, out, PyBUF_STRIDED, table.itemsize) < 0) {
        PyBuffer_Release(&table);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t outer = 0; outer < pair.outer; outer++)
        for (Py_ssize_t middle = 0; middle < pair.middle; middle++) {
            const uint16_t *from = (const uint16_t *)row(&pair.left, outer, middle);
            char *to = row(&pair.right, outer, middle);
            if (table.itemsize == 2)
                lookup_2(table.buf, from, (uint16_t *)to, pair.count);
            else
                lookup_4(table.buf, from, (uint32_t *)to, pair.count);
        }
    Py_END_ALLOW_THREADS
    release(&pair);
    PyBuffer_Release(&table);
    Py_RETURN_NONE;
}

static PyObject *scale(PyObject *module, PyObject *arguments) {
    PyObject *stored, *out;
    float factor;
    int bfloat;
    Pair pair;
    if (!PyArg_ParseTuple(arguments, "OfpO", &stored, &factor, &bfloat, &out))
        return NULL;
    if (open_pair(&pair, stored, PyBUF_STRIDED_RO, 2, out, PyBUF_STRIDED, 2) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t outer = 0; outer < pair.outer; outer++)
        for (Py_ssize_t middle = 0; middle < pair.middle; middle++)
            (bfloat ? scale_bfloats : scale_halves)((const uint16_t *)row(&pair.left, outer, middle), factor, (uint16_t *)row(&pair.right, outer, middle), pair.count);
    Py_END_ALLOW_THREADS
    release(&pair);
    Py_RETURN_NONE;
}

static PyObject *add(PyObject *module, PyObject *arguments) {
    PyObject *stored, *values;
    int bfloat;
    Pair pair;
    if (!PyArg_ParseTuple(arguments, "OOp", &stored, &values, &bfloat))
        return NULL;
    if (open_pair(&pair, stored, PyBUF_STRIDED, 2, values, PyBUF_STRIDED_RO, 4) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t outer = 0; outer < pair.outer; outer++)
        for (Py_ssize_t middle = 0; middle < pair.middle; middle++)
            (bfloat ? add_bfloats : add_halves)((uint16_t *)row(&pair.left, outer, middle), (const float *)row(&pair.right, outer, middle), pair.count);
    Py_END_ALLOW_THREADS
    release(&pair);
    Py_RETURN_NONE;
}

static PyObject *accumulate(PyObject *module, PyObject *arguments) {
    PyObject *rows_object, *total_object;
    int bfloat;
    Py_buffer rows, total;
    if (!PyArg_ParseTuple(arguments, "OpO", &rows_object, &bfloat, &total_object))
        return NULL;
    if (PyObject_GetBuffer(rows_object, &rows, PyBUF_STRIDED_RO) < 0)
        return NULL;
    if (PyObject_GetBuffer(total_object, &total, PyBUF_STRIDED) < 0) {
        PyBuffer_Release(&rows);
        return NULL;
    }
    int fits = rows.ndim == 2 && side_by_side(&rows, 2) && total.ndim == 1 && side_by_side(&total, 4) && rows.shape[1] == total.shape[0];
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t at = 0; at < rows.shape[0]; at++)
            (bfloat ? accumulate_bfloats : accumulate_halves)((const uint16_t *)row(&rows, 0, at), total.buf, total.shape[0]);
        Py_END_ALLOW_THREADS
    } else
        PyErr_SetString(PyExc_ValueError, "expected (rows, columns) of 2-byte entries, and as many columns of 4 bytes");
    PyBuffer_Release(&total);
    PyBuffer_Release(&rows);
    if (!fits)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *largest(PyObject *module, PyObject *stored) {
    Py_buffer array;
    uint16_t found = 0;
    if (PyObject_GetBuffer(stored, &array, PyBUF_C_CONTIGUOUS) < 0)
        return NULL;
    int fits = array.itemsize == 2;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        found = largest_magnitude(array.buf, array.len / 2);
        Py_END_ALLOW_THREADS
    } else
        PyErr_SetString(PyExc_ValueError, "expected 2-byte entries");
    PyBuffer_Release(&array);
    return fits ? PyLong_FromLong(found) : NULL;
}

static PyMethodDef methods[] = {
    {"lookup", lookup, METH_VARARGS, "lookup(table, index, out): out[...] = table[index]"},
    {"scale", scale, METH_VARARGS, "scale(stored, factor, bfloat, out): out[...] = stored * factor, rounded to nearest, ties to even"},
    {"add", add, METH_VARARGS, "add(stored, values, bfloat): stored[...] += values, rounded to nearest, ties to even"},
    {"accumulate", accumulate, METH_VARARGS, "accumulate(rows, bfloat, total): total += row for one row after the other"},
    {"largest", largest, METH_O, "largest(stored): the largest of the bits without their sign"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "growth._bits", "Loops over 16-bit entries.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__bits(void) {
    return PyModule_Create(&definition);
}
